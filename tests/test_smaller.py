"Smaller images first: when, how, beside whom, and where not."

import numpy as np
import pytest
import torch
from common import NoisyRows, digits, quiet_fit, weights
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, set_seed
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from PIL import Image
from torch import nn

from fastsb.smaller import SmallerFirst, smaller


class Watch(Callback):
    "What the model is given in training, and in passes that do not train"

    order = 90

    def before_fit(self):
        self.seen, self.other, self.at = [], [], []
        self.handle = self.model.register_forward_pre_hook(self.look)

    def look(self, model, x):
        (self.seen if model.training else self.other).append(x[0].shape[-1])

    def before_batch(self):
        if self.training:
            self.at.append(float(self.pct_train))

    def after_fit(self):
        self.handle.remove()


def model(flat=False):
    head = [nn.Flatten(), nn.Linear(8 * 36, 10)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)


def learner(net=None, cbs=None, n=320, **kwargs):
    set_seed(1)
    x, y = digits(n + 64)
    x = x.view(-1, 1, 8, 8)
    dls = DataLoaders.from_dsets(
        NoisyRows(x[:n], y[:n]), NoisyRows(x[n:], y[n:], 0), bs=32, device="cpu", num_workers=0
    )
    return Learner(dls, net or model(), loss_func=CrossEntropyLossFlat(), cbs=cbs, **kwargs)


@pytest.mark.parametrize("size", [0.3, 0.5, 0.75, 0.9])
def test_crops_and_resizes_are_those_of_others(size):
    x = torch.rand(3, 1, 20, 30)
    h, w = round(20 * size), round(30 * size)
    crop = smaller(x, size, rng=np.random.default_rng(3))
    rng = np.random.default_rng(3)
    top, left = rng.integers(20 - h + 1), rng.integers(30 - w + 1)
    assert torch.equal(crop, x[:, :, top : top + h, left : left + w])
    for got, image in zip(smaller(x, size, "resize"), x):
        want = Image.fromarray(image[0].numpy()).resize((w, h), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(got[0], np.asarray(want), atol=2e-3)


def test_every_place_is_cropped():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    rng = np.random.default_rng(0)
    corners = {smaller(x, 0.75, rng=rng)[0, 0, 0, 0].item() for _ in range(300)}
    assert corners == {8.0 * i + j for i in range(3) for j in range(3)}


MODES = {
    "alone": None,
    "default": {},
    "scored": dict(beta=1, score="model", start=1, end=1.0),
    "prune": dict(selector="topk", score="model", batching="prune", start=1, end=1.0),
    "two_stage": dict(beta=1, score="two_stage", start=1, end=1.0),
    "stale": dict(beta=1, score="model", stale=2, start=1, end=1.0),
}


@pytest.mark.parametrize("kw", MODES.values(), ids=MODES)
@pytest.mark.parametrize("beside", [[], [MixUp], [CutMix]], ids=["", "MixUp", "CutMix"])
def test_training_and_scoring_see_small_images_and_nobody_else(kw, beside):
    if beside and kw is not None and "score" in kw:
        pytest.skip("nothing is scored where images are mixed")
    watch = Watch()
    learn = learner(cbs=[watch, *(b() for b in beside)]).smaller_first((0.5, 0.75), (0.25, 0.6))
    if kw is not None:
        learn.selective_backprop(**kw)
    quiet_fit(learn, 8, 0.05)
    want = [4 if at < 0.25 else 6 if at < 0.6 else 8 for at in watch.at]
    assert watch.seen == want and set(want) == {4, 6, 8}
    scored = kw is not None and "score" in kw
    tried, others = watch.other[:3], watch.other[3:]
    assert sorted(tried) == [4, 6, 8] and (8 in others) and ({4, 6} & {*others} != set()) == scored
    assert np.isfinite([float(l) for l in learn.recorder.losses]).all()


def test_off_is_off():
    "Of the whole size, removed, or where the model takes no smaller images: as without it, to the last bit"
    fits = {}
    for name, net, change in (
        ("plain", None, lambda learn: learn),
        ("whole", None, lambda learn: learn.smaller_first(1.0)),
        ("removed", None, lambda learn: learn.smaller_first().remove_cb(SmallerFirst)),
        ("flat", True, lambda learn: learn),
        ("flat, refused", True, lambda learn: learn.smaller_first()),
    ):
        set_seed(5)
        learn = change(learner(model(flat=bool(net))))
        fits[name] = weights(quiet_fit(learn, 3))
    for name in "whole", "removed":
        assert torch.equal(fits[name], fits["plain"])
    assert torch.equal(fits["flat, refused"], fits["flat"])


def test_a_model_that_takes_no_smaller_images_is_told_of_once(capsys):
    learn = learner(model(flat=True)).smaller_first()
    with learn.no_bar():
        learn.fit(3)
    out = capsys.readouterr().out
    assert out.count("SmallerFirst is off") == 1 and "of 6 x 6 pixels, this model fails" in out


class Map(nn.Module):
    "Predictions for each pixel"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 1)

    def forward(self, x):
        return self.conv(x)


def test_what_is_no_image_is_refused():
    x, y = digits(64)
    images = x.view(-1, 1, 8, 8)
    mask = (images[:, 0] > 0.5).long()
    for rows, net, loss, says in (
        (list(zip(x, y)), nn.Linear(64, 10), CrossEntropyLossFlat(), r"an input is a tensor .*\(32, 64\)"),
        (list(zip((x > 0.5).long(), y)), nn.Embedding(2, 10), MSELossFlat(), "an input is a tensor of torch.int64"),
        (list(zip(images, mask)), Map(), CrossEntropyLossFlat(axis=1), "would not crop the targets"),
    ):
        dls = DataLoaders.from_dsets(rows, rows, bs=32, device="cpu", num_workers=0)
        learn = Learner(dls, net, loss_func=loss).smaller_first()
        before = weights(learn)
        with pytest.raises(ValueError, match=says):
            quiet_fit(learn, 2)
        assert torch.equal(before, weights(learn))


@pytest.mark.parametrize(
    "how,says",
    [
        (dict(size=0), "size=0 must be"),
        (dict(size=1.2), "size=1.2 must be"),
        (dict(until=0.0), "until=0.0 must be"),
        (dict(size=(0.5, 0.75)), "one number for each stage"),
        (dict(size=(0.5, 0.75), until=(0.6, 0.3)), "must rise"),
        (dict(how="pad"), "how='pad' must be one of"),
        (dict(seed=-1), "seed=-1 must be"),
    ],
)
def test_wrong_settings(how, says):
    with pytest.raises(ValueError, match=says):
        learner().smaller_first(**how)


def test_of_time_only_the_clocks_can_be_asked_for():
    learn = learner().smaller_first()
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match="pass seconds= instead"):
            learn.fit_for(3, 1e-2)
        learn.fit_for(seconds=1, lr_max=1e-2)
    assert learn.small_images.now == 1


def test_no_fit_is_no_fit():
    "A learning-rate search and predictions see whole images"
    watch = Watch()
    learn = learner(cbs=watch).smaller_first()
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=12)
    assert set(watch.seen) == {8}
    pred, _ = learn.get_preds()
    assert pred.shape == (64, 10)


def test_resumed_it_crops_at_the_same_places(tmp_path):
    class Batches(Callback):
        order = 95

        def before_fit(self):
            self.seen = []

        def before_batch(self):
            if self.training:
                self.seen.append((self.epoch, self.x.shape[-1], self.x.double().sum().item()))

    def new():
        return learner(cbs=Batches(), path=tmp_path).smaller_first(0.5, 0.9).selective_backprop(seed=0)

    whole = quiet_fit(new(), 6, 0.05, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    resumed = new()
    resumed.load("model_2")
    resumed.sb.load("model_2")
    quiet_fit(resumed, 6, 0.05, start_epoch=3)
    assert resumed.batches.seen == [b for b in whole.batches.seen if b[0] >= 3]
    assert torch.equal(weights(whole), weights(resumed))
