# python train.py config/maml_demo.py
# The same model, tokens and steps as config/baseline_demo.py, meta-learned: every task is one domain, learned chunk by
# chunk with learned inner rates, and what is minimised is the mean loss of the chunks just before they are learned.

out_dir = "out/maml_demo"
dataset = "local"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 96

batch_size = 8
tasks_per_step = 8
max_steps = 270

inner_steps = 1
inner_lr = 0.02
learn_inner_lr = True
first_order_steps = 200

learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 30
eval_interval = 45
eval_steps = 2
