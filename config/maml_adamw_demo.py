# python train.py config/maml_adamw_demo.py
# The ordered system: the inner loop is AdamW with warm-up and a cosine schedule, as most language
# models are trained. All else is as in config/maml_demo.py, plain steps first.

out_dir = "out/maml_adamw_demo"
dataset = "local"
device = "cpu"  # so small a model is no faster elsewhere, and figures are those of every machine
block_size, n_layer, n_head, n_embd = 128, 3, 4, 96

plain_steps, plain_batch_size, plain_tasks_per_step = 960, 8, 1
tasks = "passage"
batch_size = 8
tasks_per_step = 4
max_steps = 960 + 144
inner_steps = 7
first_order = True
inner_optimizer, inner_lr = "adamw", 1e-3
inner_schedule, inner_warmup = "cosine", 1
learn_inner_lr, inner_lr_lr = "element", 0.1

learning_rate = 4e-3
warmup_steps = 120
eval_interval = 240
