# python train.py config/maml_corpus.py
# The model, tokens and steps of config/baseline_corpus.py, meta-learned: three inner steps on each task of one domain.

out_dir = "out/maml_corpus"
dataset = "corpus"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 4
tasks_per_step = 10
max_steps = 780

inner_steps = 3
inner_lr = 0.02
learn_inner_lr = True
first_order = True

learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 47
eval_interval = 78
eval_steps = 16
log_interval = 78
