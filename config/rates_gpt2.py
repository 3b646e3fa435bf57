# python train.py config/rates_gpt2.py
# From a pretrained GPT-2, which stays as it is: a learning rate for each of its tensors is learned
# on passages of your own domains. `python adapt.py out/rates_gpt2 --text FILE` reads with them.
#     pip install transformers
#     python prepare_data.py PATH --name mine --tokenizer gpt2 --heldout DOMAIN --tune DOMAIN
# 100 steps, 1.6 million tokens: an estimate is five minutes on one GPU, where it was never run.
# Without one, --block_size=256 --tasks_per_step=1 --max_steps=24: 24 passages, at a minute each on
# one core (measured with a model of 135M, results/pretrained.jsonl), and the evaluations.

out_dir = "out/rates_gpt2"
init_from = "gpt2"  # or gpt2-medium, OWNER/NAME on the hub, a folder that save_pretrained wrote
dataset = "mine"
block_size = 512  # of GPT-2's 1024 positions

tasks, batch_size, tasks_per_step = "passage", 8, 4
inner_steps, first_order = 7, True
# what the tune domains chose at 135M, where one tuned rate read unseen domains as well
inner_optimizer, inner_lr = "adamw", 1.6e-4
learn_inner_lr, inner_lr_lr = "tensor", 0.1
learning_rate = 0.0  # theta stays
max_steps, warmup_steps = 100, 5
eval_interval, eval_passages, eval_rows = 50, 1, 8
