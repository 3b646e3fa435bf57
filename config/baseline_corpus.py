# python train.py config/baseline_corpus.py
# The baseline of README's comparison: 0.84M parameters, byte tokens of 10 domains, 4 million of them.

out_dir = "out/baseline_corpus"
dataset = "corpus"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 4
tasks_per_step = 10
max_steps = 780
shuffle_domains = True

learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 47
eval_interval = 78
eval_steps = 16
log_interval = 78
