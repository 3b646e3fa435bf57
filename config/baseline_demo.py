# python train.py config/baseline_demo.py
# Plain pretraining: every batch mixes all train domains, of each the same share. About a minute on
# two CPU cores. Eight rows a step, since larger batches cost more tokens at this size.

out_dir = "out/baseline_demo"
dataset = "local"
tasks = "mixed"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 96

batch_size = 8
tasks_per_step = 1
max_steps = 2000

learning_rate = 4e-3
warmup_steps = 120
eval_interval = 400
