# python train.py config/baseline_corpus.py
# The baseline of the README's comparison, at the common batch: 40 rows a step, 3 million byte tokens of 10 domains.
# Its best batch at this size is five times smaller: --batch_size=8 --tasks_per_step=1 --eval_steps=10 --max_steps=2930
# --warmup_steps=176 --eval_interval=489. Four minutes on one CPU core; ends at 2.01 on train, 2.32 on held-out domains.

out_dir = "out/baseline_corpus"
dataset = "corpus"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 4
tasks_per_step = 10
max_steps = 586
shuffle_domains = True

learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 35
eval_interval = 98
eval_steps = 20
