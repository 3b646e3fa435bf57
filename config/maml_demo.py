# python train.py config/maml_demo.py
# The recipe: plain pretraining for five eighths of the tokens, then meta-learning. Theta, and a
# rate for each of its elements, are trained so that learning a passage, row by row, helps with the
# next row. As many tokens as config/baseline_demo.py.

out_dir = "out/maml_demo"
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
inner_optimizer, inner_lr = "normed", 1e-3
learn_inner_lr, inner_lr_lr = "element", 0.1

learning_rate = 4e-3
warmup_steps = 120
eval_interval = 240
