# torchrun --nproc_per_node=8 train.py config/maml_124m.py
# GPT-2 124M, meta-learned: a task's 16 rows are learned two at a time, each pair predicted first. A long inner loop of
# first order on mixed domains did best at a large batch, at a hundredth of this size (README, Results). Not yet run.

out_dir = "out/maml_124m"
dataset = "common_pile"
dtype = "bfloat16"
compile = True
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768

batch_size = 16
tasks_per_step = 32
max_steps = 19_073
shuffle_domains = True

inner_steps = 7
learn_inner_lr = True
first_order = True

learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
eval_interval = 500
