# python train.py config/maml_demo.py
# The same model, tokens and steps as config/baseline_demo.py, meta-learned: four rows are predicted and learned, with
# learned rates, and four more predicted. First order, on mixed domains (README, Results, says why); tasks of one domain
# are --shuffle_domains=False --tasks_per_step=8 --max_steps=270 --warmup_steps=16. Ends where the baseline does.

out_dir = "out/maml_demo"
dataset = "local"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 96

batch_size = 8
tasks_per_step = 1
max_steps = 2160
shuffle_domains = True

inner_steps = 1
learn_inner_lr = True
first_order = True

learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 130
eval_interval = 360
eval_steps = 2
