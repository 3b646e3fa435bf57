# torchrun --nproc_per_node=8 train.py config/maml_124m.py
# GPT-2 124M by the recipe: plain pretraining for four fifths of the tokens, then meta-learning of
# theta and of a learning rate for each of its elements. A task is 64 consecutive rows of one
# domain. They are learned 8 at a time, each 8 predicted first. Tokens as in
# config/baseline_124m.py: 524,288 a step, 10 billion in all. Never run on a GPU.
# With AdamW and a schedule in the inner loop: --inner_optimizer=adamw --inner_schedule=cosine

out_dir = "out/maml_124m"
dataset = "common_pile"
device = "cuda"  # without a driver the run stops, instead of training on CPUs
dtype = "bfloat16"
compile = True
block_size, n_layer, n_head, n_embd = 1024, 12, 12, 768

plain_steps, plain_batch_size, plain_tasks_per_step = 15_258, 16, 32
tasks, batch_size, tasks_per_step = "passage", 64, 8
max_steps = 19_073
inner_steps, first_order = 7, True
inner_optimizer, inner_lr = "normed", 1e-4
learn_inner_lr, inner_lr_lr = "element", 0.1

learning_rate, warmup_steps = 6e-4, 700
eval_interval, eval_rows = 500, 32
