# python train.py config/maml_corpus.py
# The model and tokens of config/baseline_corpus.py, meta-learned: a task's 20 rows are learned one by one, with learned
# rates, first order, on mixed domains. Ends at 1.52 on train, 2.17 on held-out domains (seed 1, bfloat16).
# At the common batch: --tasks_per_step=2 --max_steps=1953 --warmup_steps=117 --eval_interval=196.

out_dir = "out/maml_corpus"
dataset = "corpus"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 20
tasks_per_step = 1
max_steps = 3906
shuffle_domains = True

inner_steps = 19
learn_inner_lr = True
first_order = True

learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 234
eval_interval = 391
keep_interval = 3_128  # at four fifths: what adaptation brings there dates its speed-up
eval_steps = 4
