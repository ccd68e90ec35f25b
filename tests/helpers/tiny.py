"""Recipe keys of a run of seconds that has whatever could make two runs differ; tests add theirs behind them."""

TINY = [
    "data.synthetic.height=64", "data.synthetic.width=64", "data.synthetic.train=12", "data.synthetic.val=2",
    "augment.scale=[64,64]", "augment.crop=[64,64]", "model.drop_path=0.2", "model.dropout=0.1", "distill.group=2",
    "train.batch=4", "train.micro_batch=2", "train.steps=6", "train.workers=2", "train.log_every=2",
    "train.eval_every=3", "train.save_every=2",
]  # fmt: skip
