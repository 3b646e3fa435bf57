# python train.py config/rates_demo.py
# How the baseline learns best: its theta stays as it is, and a rate for each of its elements is
# learned on passages of the train domains. A minute and a half on two CPU cores.

out_dir = "out/rates_demo"
init_from = "out/baseline_demo/ckpt.pt"
dataset = "local"
tasks = "passage"

batch_size = 8
tasks_per_step = 4
max_steps = 256
inner_steps = 7
first_order = True

learn_inner_lr = "element"
inner_lr = 0.05
inner_lr_lr = 0.1
learning_rate = 0.0
warmup_steps = 10
eval_interval = 128
