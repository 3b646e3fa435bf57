# python train.py config/maml_demo.py
# Meta-learning: theta and a rate for each of its elements are trained so that reading a passage,
# row by row, helps with the next row. It begins from the baseline and costs what rates_demo costs.

out_dir = "out/maml_demo"
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
learning_rate = 4e-3
warmup_steps = 10
eval_interval = 128
