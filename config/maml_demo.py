# python train.py config/maml_demo.py
# The same model, tokens and steps as config/baseline_demo.py, meta-learned: every task is one domain, learned row by
# row with learned inner rates, and what is minimised is the mean loss of the rows just before they are learned.
# A long inner loop of first order, as in config/maml_corpus.py, did best in the README's comparison.

out_dir = "out/maml_demo"
dataset = "local"
block_size = 128
n_layer = 3
n_head = 4
n_embd = 96

batch_size = 16
tasks_per_step = 4
max_steps = 270

inner_steps = 15
inner_lr = 0.02
learn_inner_lr = True
first_order = True

learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 30
eval_interval = 45
eval_steps = 1
