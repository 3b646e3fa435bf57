# python train.py config/baseline_corpus.py
# The best baseline of the README's comparison: 4 rows a step, 10 million byte tokens of 10 domains, the best of five
# batch sizes and, there, three rates. Ends at 1.54 on train, 2.20 on held-out domains (seed 1, bfloat16). At the
# common batch: --batch_size=4 --tasks_per_step=10 --learning_rate=4e-3 --min_lr=4e-4 --max_steps=1953
# --warmup_steps=117 --eval_interval=196.

out_dir = "out/baseline_corpus"
dataset = "corpus"
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

batch_size = 4
tasks_per_step = 1
max_steps = 19_531
shuffle_domains = True

learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 1172
eval_interval = 1954
keep_interval = 15_632  # at four fifths: what adaptation brings there dates its speed-up
eval_steps = 20
