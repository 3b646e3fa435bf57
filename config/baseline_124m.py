# torchrun --nproc_per_node=8 train.py config/baseline_124m.py
# GPT-2 124M as people pretrain it: every batch mixes all domains, half a million tokens a step, 10 billion in all.
# The same tokens as config/maml_124m.py; train both, adapt both, plot both. Not yet run, on GPUs or in full.

out_dir = "out/baseline_124m"
dataset = "common_pile"
dtype = "bfloat16"
compile = True
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768

batch_size = 16
tasks_per_step = 32
max_steps = 19_073
shuffle_domains = True

learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
eval_interval = 500
