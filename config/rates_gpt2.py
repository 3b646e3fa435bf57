# python train.py config/rates_gpt2.py
# From a pretrained GPT-2, which stays as it is: a learning rate for each of its tensors is learned
# on passages of your own domains. Then python adapt.py out/rates_gpt2 --text FILE reads with them.
#     pip install transformers
#     python prepare_data.py PATH --name mine --tokenizer gpt2 --heldout DOMAIN --tune DOMAIN

out_dir = "out/rates_gpt2"
init_from = "gpt2"  # or gpt2-medium, OWNER/NAME of the hub, or a folder that save_pretrained wrote
dataset = "mine"
block_size = 512  # GPT-2's positions are cropped to it

tasks = "passage"
batch_size = 8
tasks_per_step = 4
max_steps = 100
inner_steps = 7
first_order = True
inner_optimizer, inner_lr = "normed", 2e-5
learn_inner_lr, inner_lr_lr = "tensor", 0.1
learning_rate = 0.0  # theta stays
warmup_steps = 10
eval_interval = 50
