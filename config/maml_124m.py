# torchrun --nproc_per_node=8 train.py config/maml_124m.py
# GPT-2 124M, meta-learned from scratch: theta and a learning rate for every element of it.
# A task is 64 consecutive rows of one domain. They are learned 8 at a time, each 8 predicted first.
# Tokens as in config/baseline_124m.py: 524,288 a step, 10 billion in all. Never run on a GPU; on
# paper at 0.83 of its speed (README). The inner rates and inner_clip are guesses from 0.84M
# parameters, where it was better to go on from a plain checkpoint for a fifth of the tokens.

out_dir = "out/maml_124m"
dataset = "common_pile"
device = "cuda"  # without a driver the run stops, instead of training on CPUs
dtype = "bfloat16"
compile = True
block_size, n_layer, n_head, n_embd = 1024, 12, 12, 768

tasks = "passage"
batch_size = 64
tasks_per_step = 8
inner_steps = 7
first_order = True
learn_inner_lr = "element"
max_steps = 19_073

learning_rate, warmup_steps = 6e-4, 700
eval_interval, eval_rows = 500, 32
