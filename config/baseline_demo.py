# python train.py config/baseline_demo.py
# Plain pretraining as people do it: every batch mixes all train domains. A minute on 2 CPU cores.

out_dir = "out/baseline_demo"
dataset = "local"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 96

batch_size = 8
tasks_per_step = 8
max_steps = 270
shuffle_domains = True

learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 30
eval_interval = 45
eval_steps = 2
