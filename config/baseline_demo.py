# python train.py config/baseline_demo.py
# Plain pretraining: every batch mixes all train domains, of each the same share. As many tokens as
# config/maml_demo.py. Eight rows a step, since larger batches cost more tokens at this size.

out_dir = "out/baseline_demo"
dataset = "local"
device = "cpu"  # so small a model is no faster elsewhere, and figures are those of every machine
block_size, n_layer, n_head, n_embd = 128, 3, 4, 96

tasks = "mixed"
batch_size = 8
tasks_per_step = 1
max_steps = 1536

learning_rate = 4e-3
warmup_steps = 120
eval_interval = 384
