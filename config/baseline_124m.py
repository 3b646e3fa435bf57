# torchrun --nproc_per_node=8 train.py config/baseline_124m.py
# GPT-2 124M, plainly: every batch mixes all domains, of each the same share, small ones too.
# 524,288 tokens a step, 10 billion in all.
# The same tokens as config/maml_124m.py: train both, read with both, plot both.
# Never run on a GPU.

out_dir = "out/baseline_124m"
dataset = "common_pile"
device = "cuda"  # without a driver the run stops, instead of training on CPUs
dtype = "bfloat16"
compile = True
block_size, n_layer, n_head, n_embd = 1024, 12, 12, 768

tasks = "mixed"
batch_size = 16
tasks_per_step = 32
max_steps = 19_073

learning_rate, warmup_steps = 6e-4, 700
eval_interval, eval_rows = 500, 32
