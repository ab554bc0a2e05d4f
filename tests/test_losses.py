"`per_item_loss` against PyTorch's own loss of each example alone."

from collections import deque
from functools import partial

import numpy as np
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

from fastsb.losses import (
    doubt_problem,
    has_target,
    loss_and_doubt,
    loss_kind,
    loss_setting,
    per_item_loss,
    prediction_entropy,
    shows_doubt,
    unreduced,
    weighted_loss,
)

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
    alone = [
        torch.as_tensor(lf(pred[i : i + 1], *(o[i : i + 1] for o in args(t)))).as_subclass(torch.Tensor)
        for i in range(B)
    ]
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.CrossEntropyLoss(ignore_index=255),
        lambda: CrossEntropyLossFlat(axis=1, ignore_index=255),
        lambda: partial(F.cross_entropy, ignore_index=255),
    ],
)
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
    torch.testing.assert_close(
        items, F.cross_entropy(p.as_subclass(torch.Tensor), t.as_subclass(torch.Tensor), reduction="none")
    )


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


# is it a loss that is known? ----------------------------------------------------
class FocalLoss(nn.Module):
    "Binary, as in many notebooks"

    reduction = "mean"

    def forward(self, p, y):
        b = F.binary_cross_entropy_with_logits(p, y, reduction="none")
        loss = (1 - (-b).exp()) ** 2 * b
        return loss.mean() if self.reduction == "mean" else loss


class NLLLoss(nn.Module):
    "Gaussian, of a mean and a log-variance"


def cross_entropy(pred, y, reduction="mean"):
    return F.cross_entropy(pred[0], y, reduction=reduction)


class Mine(nn.CrossEntropyLoss):
    pass


class MineFlat(CrossEntropyLossFlat):
    def __call__(self, pred, y, extra):
        return super().__call__(pred, y)


class Wraps(nn.Module):
    "Not a fastai loss, though it has a `func`"

    def __init__(self):
        super().__init__()
        self.func = nn.CrossEntropyLoss()


known = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1), Mine(), MineFlat()),
    "cross_entropy": (F.cross_entropy, partial(partial(F.cross_entropy, label_smoothing=0.1), ignore_index=3)),
    "LabelSmoothingCrossEntropy": (LabelSmoothingCrossEntropyFlat(), LabelSmoothingCrossEntropyFlat().func),
    "FocalLoss": (FocalLossFlat(), FocalLossFlat().func),
    "NLLLoss": (nn.NLLLoss(),),
    "nll_loss": (F.nll_loss,),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat()),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits,),
    "MSELoss": (nn.MSELoss(), MSELossFlat()),
}


def test_losses_are_known_by_what_they_are_and_not_by_name():
    for name, losses in known.items():
        for lf in losses:
            assert loss_kind(lf) == name
            assert shows_doubt(lf) == (name != "MSELoss")
    for lf in (
        FocalLoss(),
        NLLLoss(),
        cross_entropy,
        partial(cross_entropy, reduction="sum"),
        Wraps(),
        nn.GaussianNLLLoss(),
        nn.L1Loss(),
        BCELossFlat(),
        lambda p, y: 0.0,
    ):
        assert not shows_doubt(lf) and "." in loss_kind(lf)
    assert loss_kind(FocalLoss()) == f"{__name__}.FocalLoss"


@pytest.mark.parametrize(
    "lf,pred,y,words",
    [
        (FocalLoss(), (B, 1), "float", "test_losses.FocalLoss is not known"),
        (nn.MSELoss(), (B, 2), None, "not known"),
        (nn.CrossEntropyLoss(), (B, 1), "int", "one column"),
        (nn.CrossEntropyLoss(), (B,), "int", "no dimension of classes"),
        (CrossEntropyLossFlat(axis=1), (B, 1, 4), "int", "one column"),
        (nn.CrossEntropyLoss(), (B, 3), (B, 2), "targets of shape (6, 2) do not fit"),
        (nn.CrossEntropyLoss(), (B, 3), (B - 1,), "do not fit"),
        (nn.CrossEntropyLoss(), (B, 3, 4), (B, 5), "do not fit"),
        (nn.BCEWithLogitsLoss(), (B, 3), (B,), "do not fit"),
        (nn.CrossEntropyLoss(), tuple, "int", "gives a tuple"),
    ],
)
def test_predictions_that_show_no_doubt(lf, pred, y, words):
    p = (rnd(B, 3), rnd(B, 3)) if pred is tuple else rnd(*pred)
    t = (
        ()
        if y is None
        else (
            torch.zeros(B, dtype=torch.long if y == "int" else torch.float)
            if isinstance(y, str)
            else torch.zeros(y).long(),
        )
    )
    assert words in doubt_problem(lf, p, *t)
    assert prediction_entropy(lf, p, *t) is None


def test_predictions_that_do():
    for lf, p, *t in (
        (nn.CrossEntropyLoss(), rnd(B, 3), ints(3, B)),
        (nn.CrossEntropyLoss(), rnd(B, 3), rnd(B, 3).softmax(1)),
        (MineFlat(), rnd(B, 3), ints(3, B), rnd(B)),
        (nn.CrossEntropyLoss(), rnd(B, 3, 4, 5), ints(3, B, 4, 5)),
        (CrossEntropyLossFlat(), rnd(B, 9, 3), ints(3, B, 9)),
        (CrossEntropyLossFlat(axis=1), rnd(B, 3, 9), ints(3, B, 9)),
        (BCEWithLogitsLossFlat(), rnd(B, 1), ints(2, B)),
        (nn.BCEWithLogitsLoss(), rnd(B, 7), ints(2, B, 7).float()),
        (CrossEntropyLossFlat(), rnd(B, 3), ints(3, B, 1)),
        (nn.CrossEntropyLoss(), rnd(B, 3)),
        (F.nll_loss, rnd(B, 3), ints(3, B)),
        (nn.CrossEntropyLoss(), rnd(0, 3), ints(3, 0)),
    ):
        assert doubt_problem(lf, p, *t) is None
        assert prediction_entropy(lf, p, *t).shape == (len(p),)


# what has no target has no doubt ----------------------------------------------------
def entropy(p, axis):
    p = p.double().softmax(axis).numpy()
    return -(p * np.log(p)).sum(axis)


@pytest.mark.parametrize("ignore", [-100, 255])
@pytest.mark.parametrize(
    "make,axis",
    [
        (lambda **k: nn.CrossEntropyLoss(**k), 1),
        (lambda **k: CrossEntropyLossFlat(axis=1, **k), 1),
        (lambda **k: CrossEntropyLossFlat(**k), -1),
        (lambda **k: partial(F.cross_entropy, **k), 1),
        (lambda **k: nn.NLLLoss(**k), 1),
    ],
)
def test_ignored_elements_have_no_doubt(make, axis, ignore):
    p, t = (rnd(B, 3, 4, 5), ints(3, B, 4, 5)) if axis == 1 else (rnd(B, 20, 3), ints(3, B, 20))
    for i in range(B):
        t[i].view(-1)[: 4 * i] = ignore
    t[-1] = ignore
    h, there = entropy(p, axis), (t != ignore).numpy()
    want = [h[i][there[i]].mean() if there[i].any() else 0.0 for i in range(B)]
    np.testing.assert_allclose(prediction_entropy(make(ignore_index=ignore), p, t), want, rtol=1e-5)
    p[-1] = torch.nan  # whatever is predicted where there is nothing to be learnt
    assert prediction_entropy(make(ignore_index=ignore), p, t)[-1] == 0


def test_a_class_of_weight_0_has_no_doubt():
    p, t, w = rnd(B, 3, 8), ints(3, B, 8), torch.tensor([0.0, 1.0, 2.0])
    t[0] = 0
    there = (t != 0).numpy()
    h = entropy(p, 1)
    want = [h[i][there[i]].mean() if there[i].any() else 0.0 for i in range(B)]
    np.testing.assert_allclose(prediction_entropy(nn.CrossEntropyLoss(weight=w), p, t), want, rtol=1e-5)
    smooth = prediction_entropy(
        nn.CrossEntropyLoss(weight=w, label_smoothing=0.1), p, t
    )  # there the others have a part
    np.testing.assert_allclose(smooth, h.mean(1), rtol=1e-5)


def test_a_row_without_a_target_has_loss_0():
    t = ints(3, B)
    t[2] = -100
    for lf in (
        nn.CrossEntropyLoss(),
        CrossEntropyLossFlat(),
        F.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ):
        assert per_item_loss(lf, rnd(B, 3), t)[2] == 0


# a loss with weights ----------------------------------------------------
cw = torch.tensor([0.1, 1.0, 7.0])
ignoring = ints(3, B, 4, 5)
ignoring[0, :3] = ignoring[2, 1:] = -100
labels = torch.tensor([0, 2, -100, 1, 2, 0])
weightings = {
    "ce": (nn.CrossEntropyLoss(), rnd(B, 3), ints(3, B)),
    "ce class weights": (nn.CrossEntropyLoss(weight=cw), rnd(B, 3), ints(3, B)),
    "ce ignored": (nn.CrossEntropyLoss(), rnd(B, 3), labels),
    "ce class weights, ignored, smoothing": (nn.CrossEntropyLoss(weight=cw, label_smoothing=0.2), rnd(B, 3), labels),
    "ce images, ignored": (nn.CrossEntropyLoss(weight=cw), rnd(B, 3, 4, 5), ignoring),
    "ce sum": (nn.CrossEntropyLoss(weight=cw, reduction="sum"), rnd(B, 3, 4, 5), ignoring),
    "ce none": (nn.CrossEntropyLoss(reduction="none"), rnd(B, 3), ints(3, B)),
    "F.ce": (partial(F.cross_entropy, weight=cw), rnd(B, 3), labels),
    "nll class weights": (nn.NLLLoss(weight=cw), rnd(B, 3).log_softmax(1), ints(3, B)),
    "bce pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 8)), rnd(B, 7), ints(2, B, 7).float()),
    "mse": (nn.MSELoss(), rnd(B, 2, 3), rnd(B, 2, 3)),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), rnd(B, 3).log_softmax(1), rnd(B, 3).softmax(1)),
    "flat ce": (CrossEntropyLossFlat(axis=1, weight=cw), rnd(B, 3, 4, 5), ignoring),
    "flat ce sum": (CrossEntropyLossFlat(reduction="sum"), rnd(B, 3), ints(3, B)),
    "flat bce": (BCEWithLogitsLossFlat(), rnd(B, 7), ints(2, B, 7).float()),
    "flat focal": (FocalLossFlat(weight=cw), rnd(B, 3), ints(3, B)),
    "flat smoothing": (LabelSmoothingCrossEntropyFlat(eps=0.2), rnd(B, 3), ints(3, B)),
    "negative": (nn.GaussianNLLLoss(), (rnd(B, 2)), (rnd(B, 2) * 0.1, torch.full((B, 2), 0.01))),
}


def normaliser(lf, t):
    "What PyTorch's documentation says a loss divides by"
    reduction, weight = loss_setting(lf, "reduction"), loss_setting(lf, "weight")
    classes = t[0].dtype == torch.long
    if reduction == "sum":
        return 1.0
    if reduction == "batchmean":
        return B
    real = t[0][t[0] >= 0] if classes else t[0]
    return weight[real].sum() if classes and weight is not None and "Focal" not in loss_kind(lf) else real.numel()


@pytest.mark.parametrize("name", weightings)
def test_weights_scale_what_each_example_adds(name):
    lf, p, t = weightings[name]
    t = args(t)
    own = torch.as_tensor(lf(p, *t)).as_subclass(torch.Tensor)
    own = own.mean() if own.dim() else own
    p1 = p.clone().requires_grad_()
    same, record = weighted_loss(lf, p1, *t, w=torch.ones(B))
    assert same.item() == own.item() == record.item() and not record.requires_grad  # to the last bit
    p2 = p.clone().requires_grad_()
    lf(p2, *t).mean().backward()
    same.backward()
    assert torch.equal(p1.grad, p2.grad)

    w = torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0, 1.0])
    p3, p4 = p.clone().requires_grad_(), p.clone().requires_grad_()
    by = normaliser(lf, t)
    with unreduced(lf) as f:
        rows = f(p3, *t).as_subclass(torch.Tensor).reshape(B, -1).sum(1)
    want = (w * rows).sum() / by
    got, record = weighted_loss(lf, p4, *t, w=w)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert record.item() == own.item()
    want.backward()
    got.backward()
    torch.testing.assert_close(p4.grad, p3.grad, rtol=1e-3, atol=1e-6)


def test_ctc_is_divided_by_the_lengths():
    T, S = 20, 5
    logp, y = rnd(T, B, 6).log_softmax(2), ints(5, B, S) + 1
    lens, tlens = torch.full((B,), T), torch.tensor([5, 3, 1, 4, 2, 5])
    lf, w = nn.CTCLoss(), torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0, 1.0])
    alone = torch.stack([lf(logp[:, i : i + 1], y[i : i + 1], lens[i : i + 1], tlens[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(per_item_loss(lf, logp, y, lens, tlens), alone)
    assert weighted_loss(lf, logp, y, lens, tlens, w=torch.ones(B))[0].item() == lf(logp, y, lens, tlens).item()
    torch.testing.assert_close(weighted_loss(lf, logp, y, lens, tlens, w=w)[0], (w * alone).mean())
    total = weighted_loss(nn.CTCLoss(reduction="sum"), logp, y, lens, tlens, w=w)[0]
    torch.testing.assert_close(total, (w * alone * tlens).sum())


def test_a_loss_that_was_called_already_is_not_called_for_its_value_again():
    calls = []

    class Counts(nn.MSELoss):
        def forward(self, p, t):
            calls.append(self.reduction)
            return super().forward(p, t)

    lf, p, t = Counts(), rnd(B, 2).requires_grad_(), rnd(B, 2)
    loss = lf(p, t)
    got, own = weighted_loss(lf, p, t, w=torch.full((B,), 2.0), loss=loss)
    torch.testing.assert_close(got, 2 * loss)
    assert calls == ["mean", "none"] and own.item() == loss.item()


class Signed(nn.Module):
    "Of both signs, and with elements that are passed over"

    reduction, ignore_index = "mean", 255

    def forward(self, p, t):
        l = torch.where(t == 255, 0.0, p * (2.0 * t - 1))
        return l.sum() / (t != 255).sum() if self.reduction == "mean" else l


def test_where_losses_cancel_out_ignored_elements_do_not_count():
    "Then the loss's own value does not tell what it was divided by"
    t = torch.tensor([[0, 1, 255, 255], [1, 1, 255, 0], [0, 0, 1, 255]])
    p, w = torch.ones(3, 4, requires_grad=True), torch.tensor([1.0, 2.0, 0.5])
    got, own = weighted_loss(Signed(), p, t, w=w)
    assert own.item() == 0
    each = np.where(t == 255, 0, 2.0 * t.numpy() - 1)
    np.testing.assert_allclose(got.item(), (w.numpy() * each.sum(1)).sum() / 8, rtol=1e-6)
    got.backward()
    np.testing.assert_allclose(p.grad, w.numpy()[:, None] * each / 8, rtol=1e-6)


def test_weights_of_a_loss_with_per_item():
    def mine(p, t):
        return 3 * (p - t).abs().sum(1).mean()

    p, t, w = rnd(B, 2), rnd(B, 2), torch.arange(6.0)
    rows = (p - t).abs().sum(1)
    got, own = weighted_loss(mine, p, t, w=w, per_item=lambda p, t: (p - t).abs().sum(1))
    torch.testing.assert_close(got, 3 * (w * rows).mean())
    assert own.item() == mine(p, t).item()
    for wrong in (torch.ones(5), torch.ones(B, 1), [1.0] * B):
        with pytest.raises(ValueError, match="one weight for each of 6"):
            weighted_loss(F.mse_loss, p, t, w=wrong)


# whose loss is whose? ----------------------------------------------------
class TokenLoss(nn.Module):
    "Keeps the real tokens only, as code for tagging does"

    reduction = "mean"

    def forward(self, p, y):
        real = y.flatten() >= 0
        return F.cross_entropy(p.flatten(0, 1)[real], y.flatten()[real], reduction=self.reduction)


def test_a_loss_that_drops_tokens_is_refused_whatever_is_left():
    r = np.random.default_rng(0)
    for left in range(30):
        p, y = rnd(B, 5, 4), ints(4, B, 5)
        while True:
            gone = r.permutation(30)[: 30 - left]
            counts = np.bincount(np.delete(np.arange(30), gone) // 5, minlength=B)
            if len(set(counts)) > 1 or left == 0:
                break
        y.view(-1)[torch.as_tensor(gone)] = -100
        with pytest.raises(TypeError, match="per_item="):
            per_item_loss(TokenLoss(), p, y)
    p, y = rnd(B, 5, 4), ints(4, B, 5)  # all are there, in their order
    torch.testing.assert_close(
        per_item_loss(TokenLoss(), p, y), F.cross_entropy(p.movedim(2, 1), y, reduction="none").mean(1)
    )


def test_losses_of_ones_own_with_a_number_for_each_row():
    class Dice(nn.Module):
        reduction = "mean"

        def forward(self, p, t):
            p, t = p.sigmoid().flatten(1), t.flatten(1)
            l = 1 - 2 * (p * t).sum(1) / (p + t).sum(1)
            return l if self.reduction == "none" else l.mean()

    p, t = rnd(B, 4, 4), ints(2, B, 4, 4).float()
    torch.testing.assert_close(per_item_loss(Dice(), p, t).mean(), Dice()(p, t))

    def by_class(p, t, reduction="mean"):  # (B*T, C), flattened as far as the tokens
        return F.binary_cross_entropy_with_logits(p.flatten(0, 1), t.flatten(0, 1), reduction=reduction)

    p, t = rnd(B, 5, 3), ints(2, B, 5, 3).float()
    torch.testing.assert_close(
        per_item_loss(by_class, p, t), F.binary_cross_entropy_with_logits(p, t, reduction="none").mean((1, 2))
    )

    def transposed(p, t, reduction="mean"):
        return F.mse_loss(p.T, t.T, reduction=reduction)

    with pytest.raises(TypeError, match=r"shape \(12, 6\)"):
        per_item_loss(transposed, rnd(B, 12), rnd(B, 12))


def test_nested_and_several_targets():
    def loss(p, t, reduction="mean"):
        return F.cross_entropy(p, t["label"], reduction=reduction)

    p, y = rnd(B, 3), ints(3, B)
    torch.testing.assert_close(
        per_item_loss(loss, p, {"name": ["a"] * B, "label": y}), F.cross_entropy(p, y, reduction="none")
    )

    def two(p, a, b, reduction="mean"):
        return F.cross_entropy(p[0], a, reduction=reduction) + F.mse_loss(p[1], b, reduction="none").mean(
            1 if reduction == "none" else (0, 1)
        )

    q, b = rnd(B, 2), rnd(B, 2)
    torch.testing.assert_close(
        per_item_loss(two, (p, q), y, b), F.cross_entropy(p, y, reduction="none") + (q - b).square().mean(1)
    )


def test_reduction_where_a_module_is_called():
    class Asked(nn.Module):
        def forward(self, p, y, reduction="mean"):
            return F.cross_entropy(p, y, reduction=reduction)

    class Fixed(nn.Module):
        reduction = property(lambda self: "mean")

        def forward(self, p, y):
            return F.cross_entropy(p, y)

    class Both(Asked):
        reduction = property(lambda self: "mean")

    p, y = rnd(B, 3), ints(3, B)
    for lf in (Asked(), Both()):
        torch.testing.assert_close(per_item_loss(lf, p, y), F.cross_entropy(p, y, reduction="none"))
    with pytest.raises(TypeError, match="its `reduction` cannot be set"):
        per_item_loss(Fixed(), p, y)


def test_which_examples_have_a_target():
    t = ints(3, B, 4)
    t[1] = t[3, :2] = -100
    want = [True, False, True, True, True, True]
    assert (
        has_target(nn.CrossEntropyLoss(), t).tolist()
        == has_target(CrossEntropyLossFlat(axis=1), {"y": t}).tolist()
        == want
    )
    assert (
        has_target(nn.CrossEntropyLoss(ignore_index=9), t).all()
        and has_target(FocalLossFlat(axis=1), t).tolist() == want
    )
    assert has_target(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0, 1])), torch.tensor([0, 1, -100])).tolist() == [
        True,
        False,
        False,
    ]
    for lf, y in (
        (nn.MSELoss(), t),
        (nn.BCEWithLogitsLoss(), t.float()),
        (nn.CrossEntropyLoss(), rnd(B, 3).softmax(1)),
        (nn.CrossEntropyLoss(), "ab"),
    ):
        assert has_target(lf, y) is None


class Running(nn.Module):
    "Divides by a running mean of itself, and counts in every way that is usual"

    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.bound = torch.ones(1)  # a tensor that is no buffer
        self.scale = nn.Parameter(torch.ones(()))  # one that learns
        self.inner = nn.BatchNorm1d(1, affine=False)
        self.calls, self.seen, self.last, self.kept = 0, [], deque(maxlen=2), {}

    def forward(self, pred, y):
        l = F.cross_entropy(pred, y, reduction="none")
        self.mean.mul_(0.9).add_(0.1 * l.detach().mean())
        self.bound += 1
        self.inner(l[:, None].detach())
        self.calls += 1
        self.seen.append(len(l))
        self.last.append(self.calls)
        self.kept[self.calls] = len(l)
        l = l * self.scale / self.mean
        return l.mean() if self.reduction == "mean" else l


def state_of(loss):
    own = loss.calls, list(loss.seen), list(loss.last), dict(loss.kept), loss.bound.clone()
    return own, {k: v.clone() for k, v in loss.state_dict().items()}


def test_a_loss_with_a_state_of_its_own_keeps_it():
    "Its buffers are the same tensors as before, and a gradient still goes through it"
    loss, pred, y = Running(), torch.randn(8, 3, requires_grad=True), torch.randint(0, 3, (8,))
    loss(pred, y)
    before, buffers = state_of(loss), [id(o) for o in loss.buffers()]
    assert per_item_loss(loss, pred, y).shape == (8,) and same_state(state_of(loss), before)
    assert [id(o) for o in loss.buffers()] == buffers
    own = loss(pred, y)
    before = state_of(loss)
    l, value = weighted_loss(loss, pred, y, w=torch.ones(8), loss=own)
    torch.testing.assert_close(l, own)
    l.backward()
    assert same_state(state_of(loss), before) and pred.grad.abs().sum() > 0 and loss.scale.grad is not None


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def test_its_state_comes_back_by_an_exception_too():
    class Fails(Running):
        def forward(self, pred, y):
            super().forward(pred, y)
            if self.reduction == "none":
                raise RuntimeError("on purpose")

    loss = Fails()
    before = state_of(loss)
    with pytest.raises(RuntimeError, match="on purpose"):
        per_item_loss(loss, torch.randn(8, 3), torch.randint(0, 3, (8,)))
    assert same_state(state_of(loss), before) and loss.reduction == "mean"


# loss and doubt at once -----------------------------------------------------------------------------------------------
def plain_kinds():
    from fastai.losses import CrossEntropyLossFlat

    one, other = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=3, reduction="sum")
    return one, other, CrossEntropyLossFlat(), CrossEntropyLossFlat(ignore_index=3, reduction="sum")


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_loss_and_doubt_are_those_that_each_gives(kind, scale):
    "Bit for bit, also where a target is ignored, a prediction is certain, or not a number"
    f = plain_kinds()[kind]
    pred, y = scale * torch.randn(200, 7), torch.randint(7, (200,))
    y[5], pred[9, 2], pred[11, 0], pred[13] = -100 if kind % 2 == 0 else 3, torch.nan, torch.inf, -torch.inf
    losses, doubts = loss_and_doubt(f, pred, y)
    assert torch.equal(losses.nan_to_num(-1), per_item_loss(f, pred, y).nan_to_num(-1))
    assert torch.equal(doubts.nan_to_num(-1), prediction_entropy(f, pred, y).nan_to_num(-1))
    assert doubts[5] == losses[5] == 0


def test_loss_and_doubt_of_anything_else():
    "Where one softmax would not do, the two are asked one by one"
    from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy

    class Mine(nn.CrossEntropyLoss):
        def forward(self, pred, y):
            return 2 * super().forward(pred, y)

    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda m, i, o: 2 * o)
    pred, y = torch.randn(9, 4), torch.randint(4, (9,))
    for f in (
        Mine(),
        hooked,
        partial(nn.functional.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.rand(4)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        CrossEntropyLossFlat(weight=torch.rand(4)),
        CrossEntropyLossFlat(axis=0),
        CrossEntropyLossFlat(axis=1),  # which such targets do not have
        FocalLossFlat(),
        LabelSmoothingCrossEntropy(),
        nn.MSELoss(),
        nn.BCEWithLogitsLoss(),
    ):
        assert loss_and_doubt(f, pred, y) is None, f
    ce = nn.CrossEntropyLoss()
    for args in (
        (pred.double(), y),
        (pred[:, :1], y * 0),
        (torch.randn(9, 4, 5), torch.randint(4, (9, 5))),
        (pred, torch.rand(9, 4)),
        (pred, y[:5]),
        (pred, y, y),
        ((pred,), y),
    ):
        assert loss_and_doubt(ce, *args) is None
