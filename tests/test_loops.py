"The sampler in other people's training loops: the right items are trained once, without a forward pass to choose them."

import math

import numpy as np
import pytest
import torch
from test_sampler import Plain, entropy, highest
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from fastsb.sampler import SelectiveSampler, WithItems
from fastsb.select import Uncertainty

n, bs, epochs = 80, 8, 6


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 12, generator=g)
    return TensorDataset(x, (x[:, :3].argmax(1)))


def a_model():
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class Watched:
    "Writes down each batch: the sampler's epoch, its items, the doubt of the predictions; counts forward passes"

    def __init__(self, model, **kwargs):
        half = Uncertainty(0.5)  # a number that is known beforehand
        self.sampler = SelectiveSampler(n, half, nn.CrossEntropyLoss(), epochs=epochs, bs=bs, seed=0, **kwargs)
        self.seen, self.forwards = [[] for _ in range(epochs)], 0
        model.register_forward_hook(self.count)

    def count(self, *args):
        self.forwards += 1

    def observe(self, items, pred, yb):
        self.sampler.observe(items, pred=pred, yb=yb)
        doubts = entropy(pred.detach().float().numpy())
        self.seen[self.sampler.epoch].append((items.tolist(), doubts))

    def check(self):
        ref = Plain(n, epochs, 0.1, 0.9, 5, 0.5, highest(0.5))
        for epoch, batches in enumerate(self.seen):
            items = [i for b, _ in batches for i in b]
            want = ref.items(epoch)
            assert len(want) == (n if epoch in (0, epochs - 1) else n // 2)
            assert len(items) == len(set(items)) and set(items) == want
            assert [len(b) for b, _ in batches] == [bs] * (len(want) // bs)
            ref.observe(items, np.concatenate([d for _, d in batches]), epoch)
        memory = self.sampler.memory
        np.testing.assert_allclose(memory.doubts().numpy(), ref.value, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(memory.ages(None, epochs).numpy(), epochs - ref.last)
        steps = sum(len(batches) for batches in self.seen)
        assert self.forwards == steps == (2 * n + (epochs - 2) * n // 2) // bs
        assert self.sampler.progress == 1 and [r["bp"] for r in self.sampler.log] == [n] + [n // 2] * (epochs - 2) + [n]
        assert memory.times().sum() == steps * bs
        return steps


def falling(watched):
    return lambda step: 0.5 * (1 + math.cos(math.pi * watched.sampler.progress))


def test_plain_loop():
    model = a_model()
    w = Watched(model)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    schedule = LambdaLR(opt, falling(w))
    for _ in range(epochs):
        for xb, yb, items in DataLoader(WithItems(data()), bs, sampler=w.sampler):
            pred = model(xb)
            w.observe(items, pred, yb)
            nn.functional.cross_entropy(pred, yb).backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
    w.check()
    assert abs(opt.param_groups[0]["lr"]) < 1e-12


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate(workers):
    accelerate = pytest.importorskip("accelerate")
    model = a_model()
    w = Watched(model)
    accelerator = accelerate.Accelerator(cpu=True)
    dl = DataLoader(WithItems(data()), bs, sampler=w.sampler, num_workers=workers)
    model, opt, dl = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05), dl)
    next(iter(dl))  # a look does no harm
    for epoch in range(epochs):
        assert len(dl) == (n if epoch in (0, epochs - 1) else n // 2) // bs
        for xb, yb, items in dl:
            pred = model(xb)
            w.observe(items, pred, yb)
            accelerator.backward(nn.functional.cross_entropy(pred, yb))
            opt.step()
            opt.zero_grad()
    w.check()


def test_accelerate_goes_on_where_it_was_killed():
    "It counts the passes over its loader itself, and has to be told where it is"
    accelerate = pytest.importorskip("accelerate")

    def passes(k, state=None):
        torch.manual_seed(0)
        w = Watched(nn.Identity())
        dl = accelerate.Accelerator(cpu=True).prepare(DataLoader(WithItems(data()), bs, sampler=w.sampler))
        if state is not None:
            w.sampler.load_state_dict(state)
            dl.set_epoch(w.sampler.epoch)
        while w.sampler.epoch < k:
            for xb, yb, items in dl:
                w.observe(items, xb[:, :3], yb)
            len(dl)  # ends the epoch
        return w

    whole, killed = passes(epochs), passes(3)
    resumed = passes(epochs, killed.sampler.state_dict())
    assert str(killed.seen[:3] + resumed.seen[3:]) == str(whole.seen) and resumed.sampler.past == 0


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = a_model()
            self.watched = Watched(self.model)
            self.automatic_optimization = True

        def train_dataloader(self):
            return DataLoader(WithItems(data()), bs, sampler=self.watched.sampler)

        def training_step(self, batch, batch_idx):
            xb, yb, items = batch
            pred = self.model(xb)
            self.watched.observe(items, pred, yb)
            return nn.functional.cross_entropy(pred, yb)

        def configure_optimizers(self):
            self.opt = torch.optim.SGD(self.parameters(), 0.05)
            schedule = LambdaLR(self.opt, falling(self.watched))
            return [self.opt], [dict(scheduler=schedule, interval="step")]

    module = Module()
    settings = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", use_distributed_sampler=False, default_root_dir=tmp_path, **settings
    )
    trainer.fit(module)
    steps = module.watched.check()
    assert trainer.global_step == steps and abs(module.opt.param_groups[0]["lr"]) < 1e-12


class Sentences(torch.utils.data.Dataset):
    "As a tokenised data set: dicts"

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 40, (n, 7), generator=g)

    def __len__(self):
        return n

    def __getitem__(self, i):
        ids = self.ids[i]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=int(ids[0] % 3))


def test_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    watched = Watched(model)

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return watched.sampler

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            items = inputs.pop("items")
            out = model(**inputs)
            if model.training:
                watched.observe(items, out.logits, inputs["labels"])
            return (out.loss, out) if return_outputs else out.loss

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, falling(watched))
            return self.lr_scheduler

    settings = dict(
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    args = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=bs, **settings
    )
    trainer = Trainer(model, args, train_dataset=WithItems(Sentences()))
    trainer.train()
    steps = watched.check()
    assert trainer.state.global_step == steps and abs(trainer.optimizer.param_groups[0]["lr"]) < 1e-12
