"`per_item_loss` against PyTorch's own loss of each example alone."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.torch_core import TensorCategory, TensorImage
from torch import nn

from fastsb.losses import per_item_loss, unreduced

B = 6
g = torch.Generator().manual_seed(0)


def rnd(*s):
    return torch.randn(*s, generator=g)


def ints(c, *s):
    return torch.randint(c, s, generator=g)


cases = {
    "ce": (nn.CrossEntropyLoss(), rnd(B, 3), ints(3, B)),
    "ce smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), rnd(B, 3), ints(3, B)),
    "ce probabilities": (nn.CrossEntropyLoss(), rnd(B, 3), rnd(B, 3).softmax(1)),
    "ce images": (nn.CrossEntropyLoss(), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
    "ce int32": (CrossEntropyLossFlat(), rnd(B, 3), ints(3, B).int()),
    "nll": (nn.NLLLoss(), rnd(B, 3).log_softmax(1), ints(3, B)),
    "bce": (nn.BCEWithLogitsLoss(), rnd(B, 7), ints(2, B, 7).float()),
    "bce pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 8)), rnd(B, 7), ints(2, B, 7).float()),
    "mse": (nn.MSELoss(), rnd(B, 2, 3), rnd(B, 2, 3)),
    "huber": (nn.HuberLoss(delta=0.3), rnd(B, 4), rnd(B, 4)),
    "cosine": (nn.CosineEmbeddingLoss(), rnd(B, 4), (rnd(B, 4), torch.ones(B))),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), rnd(B, 3).log_softmax(1), rnd(B, 3).softmax(1)),
    "F.l1": (F.l1_loss, rnd(B, 4), rnd(B, 4)),
    "partial": (partial(F.cross_entropy, label_smoothing=0.1), rnd(B, 3), ints(3, B)),
    "partial of partial": (partial(partial(F.smooth_l1_loss, beta=0.2), reduction="mean"), rnd(B, 3), rnd(B, 3)),
    "flat ce": (CrossEntropyLossFlat(), rnd(B, 3), ints(3, B)),
    "flat ce axis=1": (CrossEntropyLossFlat(axis=1), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
    "flat ce sequences": (CrossEntropyLossFlat(), rnd(B, 9, 3), ints(3, B, 9)),
    "flat bce": (BCEWithLogitsLossFlat(), rnd(B, 7), ints(2, B, 7).float()),
    "flat bce probabilities": (BCELossFlat(), rnd(B, 7).sigmoid(), ints(2, B, 7).float()),
    "flat mse": (MSELossFlat(), rnd(B, 1), rnd(B)),
    "flat mse wide": (MSELossFlat(), rnd(B, 4), rnd(B, 4)),
    "flat l1": (L1LossFlat(), rnd(B, 4), rnd(B, 4)),
    "label smoothing": (LabelSmoothingCrossEntropyFlat(eps=0.2), rnd(B, 3), ints(3, B)),
    "label smoothing images": (LabelSmoothingCrossEntropyFlat(axis=1), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
    "focal": (FocalLossFlat(gamma=1.5), rnd(B, 3), ints(3, B)),
    "focal images": (FocalLossFlat(axis=1), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
    "dice mean": (DiceLoss(reduction="mean"), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
}


def args(t):
    return t if isinstance(t, tuple) else (t,)


@pytest.mark.parametrize("name", cases)
def test_mean_of_items_is_the_loss_and_each_item_is_its_own(name):
    lf, pred, t = cases[name]
    items = per_item_loss(lf, pred, *args(t))
    assert items.shape == (B,) and type(items) is torch.Tensor
    torch.testing.assert_close(items.mean(), torch.as_tensor(lf(pred, *args(t))).as_subclass(torch.Tensor))
    alone = [torch.as_tensor(lf(pred[i : i + 1], *(o[i : i + 1] for o in args(t)))).as_subclass(torch.Tensor) for i in range(B)]
    torch.testing.assert_close(items, torch.stack(alone))


def test_sum_reduction_sums():
    lf, (p, t) = nn.MSELoss(reduction="sum"), (rnd(B, 4), rnd(B, 4))
    torch.testing.assert_close(per_item_loss(lf, p, t).sum(), lf(p, t))
    assert lf.reduction == "sum"


def test_class_weights_weigh_the_losses():
    w, p, t = torch.tensor([1.0, 2.0, 5.0]), rnd(B, 3), ints(3, B)
    want = w[t] * -p.log_softmax(1)[torch.arange(B), t]
    for lf in (nn.CrossEntropyLoss(weight=w), CrossEntropyLossFlat(weight=w), partial(F.cross_entropy, weight=w)):
        torch.testing.assert_close(per_item_loss(lf, p, t), want)


@pytest.mark.parametrize("make", [lambda: nn.CrossEntropyLoss(ignore_index=255), lambda: CrossEntropyLossFlat(axis=1, ignore_index=255),
                                  lambda: partial(F.cross_entropy, ignore_index=255)])
def test_ignored_pixels_do_not_count(make):
    p, t = rnd(B, 3, 4, 5), ints(3, B, 4, 5)
    for i in range(B):
        t[i].view(-1)[: 4 * i] = 255  # the last example keeps none
    t[-1] = 255
    got = per_item_loss(make(), p, t)
    for i in range(B - 1):
        torch.testing.assert_close(got[i], F.cross_entropy(p[i : i + 1], t[i : i + 1], ignore_index=255))
    assert got[-1] == 0


def test_default_ignore_index_of_a_function():
    p, t = rnd(B, 3, 6), ints(3, B, 6)
    t[0, :3] = -100
    torch.testing.assert_close(per_item_loss(F.cross_entropy, p, t)[0], F.cross_entropy(p[:1], t[:1]))


def test_tensor_subclasses_in_plain_tensor_out():
    p, t = TensorImage(rnd(B, 3)), TensorCategory(ints(3, B))
    items = per_item_loss(CrossEntropyLossFlat(), p, t)
    assert type(items) is torch.Tensor
    torch.testing.assert_close(items, F.cross_entropy(p.as_subclass(torch.Tensor), t.as_subclass(torch.Tensor), reduction="none"))


def test_reduction_is_restored_also_by_an_exception():
    for lf in (nn.CrossEntropyLoss(), CrossEntropyLossFlat(), FocalLossFlat(reduction="sum")):
        before = lf.reduction
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            per_item_loss(lf, rnd(B, 3), ints(3, B) + 50)
        assert lf.reduction == before


def test_what_cannot_be_split_is_refused():
    def mine(p, t):
        return (p - t).abs().mean()

    class Ignores(nn.Module):
        reduction = "mean"

        def forward(self, p, t):
            return (p - t).mean()

    p, t = rnd(B, 2), rnd(B, 2)
    for lf in (mine, Ignores()):
        with pytest.raises(TypeError, match="per_item="):
            per_item_loss(lf, p, t)
    with pytest.raises(TypeError, match=r"shape \(6,\)"):
        per_item_loss(mine, p, t, per_item=lambda p, t: (p - t).abs())
    with pytest.raises(TypeError, match="returned a float"):
        per_item_loss(mine, p, t, per_item=lambda p, t: 1.0)
    with pytest.raises(TypeError), unreduced(mine):
        pass
