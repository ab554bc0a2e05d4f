"What `learn.selective_backprop()` does without arguments, and what it does where that cannot be done."

import numpy as np
import pytest
import torch
from common import NoisyRows, digits, digits_learner, digits_model, quiet_fit, weights
from fastai.basics import (
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    MSELossFlat,
    set_seed,
)
from fastai.callback.mixup import CutMix, MixUp
from test_sampler import above, fewest, highest
from torch import nn

from fastsb.callback import SelectiveBackpropCallback
from fastsb.learner import paper_settings
from fastsb.score import Doubtful
from fastsb.select import Capped, DoubtAbove, DoubtShare, Percentile, TopK, Uncertainty


class Reference(Callback):
    "Who should be trained on: moving averages of what training itself shows, in NumPy"

    order = 60

    def __init__(self, x, measure, chosen_of):
        self.chosen_of = chosen_of
        self.ids, self.measure = {r.numpy().tobytes(): i for i, r in enumerate(x)}, measure
        self.known, self.epochs, self.want = np.full(len(x), np.nan), [], []

    def before_epoch(self):
        seen = np.flatnonzero(np.isfinite(self.known))
        chosen = seen[self.chosen_of(self.known[seen])] if len(seen) else []
        self.want.append(set(chosen) | set(np.flatnonzero(np.isnan(self.known))))
        self.epochs.append([])

    def after_loss(self):
        if not self.training:
            return
        rows = [self.ids[r.numpy().tobytes()] for r in self.xb[0]]
        new = self.measure(self.pred.detach().double().numpy(), self.yb[0].numpy())
        old = self.known[rows]
        self.known[rows] = np.where(np.isnan(old), new, (old + new) / 2)
        self.epochs[-1] += rows


def entropy(pred, y):
    p = np.exp(pred - pred.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1)


def squared(pred, y):
    return ((pred - y) ** 2).mean(1)


def own_loss(pred, y, reduction="mean"):
    return nn.functional.cross_entropy(pred, y, reduction=reduction)


def learner(n, loss_func, out, targets, cbs):
    x, y = digits(n)
    y = torch.stack([y / 9.0], 1) if targets == "numbers" else y
    dls = DataLoaders.from_dsets(NoisyRows(x, y, 0), NoisyRows(x[:50], y[:50], 0), bs=32, device="cpu", num_workers=0)
    torch.manual_seed(3)
    return Learner(dls, nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, out)), loss_func=loss_func, cbs=cbs)


@pytest.mark.parametrize(
    "loss_func,out,targets,measure,chosen_of,kw",
    [
        (CrossEntropyLossFlat(), 10, "classes", entropy, above(0.7), {}),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 10, "classes", entropy, above(0.7), dict(score="cached")),
        (own_loss, 10, "classes", entropy, fewest(0.5), dict(selector=DoubtShare(0.5, like=nn.CrossEntropyLoss()))),
        (own_loss, 10, "classes", entropy, above(1), dict(selector=DoubtAbove(1.0, like=nn.CrossEntropyLoss()))),
        (own_loss, 10, "classes", entropy, highest(0.5), dict(selector=Uncertainty(0.5, like=nn.CrossEntropyLoss()))),
        (MSELossFlat(), 1, "numbers", squared, highest(0.5), dict(selector=TopK(0.5))),
    ],
)
def test_those_in_most_doubt(loss_func, out, targets, measure, chosen_of, kw):
    """By prediction entropy where there are classes, whatever the labels; by loss where that is asked for. Nothing is
    scored, nothing else is loaded"""
    ref = Reference(digits(650)[0], measure, chosen_of)
    learn = quiet_fit(learner(650, loss_func, out, targets, ref).selective_backprop(**kw), 6, 0.1)
    sb = learn.sb
    assert sb.counts["fp"] == 0 and sb.log.loads.tolist() == sb.log.bp.tolist() == [len(e) for e in ref.epochs]
    assert [len(e) for e in (ref.epochs[0], ref.epochs[-1])] == [640] * 2
    assert sum(len(e) < 600 for e in ref.epochs[1:-1]) >= 2
    for got, want in zip(ref.epochs[1:-1], ref.want[1:-1]):
        assert len(set(got)) == len(got) == len(want) // 32 * 32 and set(got) <= want


@pytest.mark.parametrize("loss_func", [MSELossFlat(), own_loss])
def test_doubt_that_is_asked_for_and_not_known_is_refused(loss_func):
    with pytest.raises(
        ValueError, match=r"Uncertainty\(keep=0.5\) goes by doubt, and .* is not known as a loss over classes.*like="
    ):
        quiet_fit(learner(330, loss_func, 1, "numbers", None).selective_backprop(selector=Uncertainty(0.5)), 3)


@pytest.mark.parametrize(
    "loss_func,name", [(MSELossFlat(), "MSELoss"), (lambda pred, y: ((pred - y) ** 2).mean(), "test_default.<lambda>")]
)
def test_where_no_doubt_is_known_everything_is_trained_on(loss_func, name, capsys):
    "As without fastsb, bit by bit, even if the loss cannot be split; and that is said"
    set_seed(0)
    plain = quiet_fit(learner(330, loss_func, 1, "numbers", None), 3)
    set_seed(0)
    learn = learner(330, loss_func, 1, "numbers", None).selective_backprop()
    with learn.no_bar():
        learn.fit_one_cycle(3, 1e-2)
    assert torch.equal(weights(plain), weights(learn))
    assert learn.sb.log.selected.tolist() == [1.0] * 3 and learn.sb.counts["fp"] == 0
    out = capsys.readouterr().out
    assert (
        "everything is trained on. The default goes by doubt, which only losses over classes show, and " in out
        and f"{name} is not known as one" in out
    )
    assert out.count("fastsb:") == 1
    quiet_fit(learn, 2)
    assert capsys.readouterr().out == ""


def test_to_choose_by_loss_can_be_asked_for(capsys):
    learn = learner(330, MSELossFlat(), 1, "numbers", None).selective_backprop(beta=1, start=1)
    with learn.no_bar():
        learn.fit(4)
    assert learn.sb.log.selected[1:3].between(0.45, 0.6).all() and "fastsb" not in capsys.readouterr().out


def test_doubt_is_known_again_with_another_loss():
    "One callback, three fits: the loss decides anew each time"
    learn = learner(330, CrossEntropyLossFlat(), 10, "classes", None).selective_backprop(start=0.3)
    for fit, (loss_func, selects) in enumerate(
        ((CrossEntropyLossFlat(), True), (lambda pred, y: 0 * pred.mean(), False), (nn.CrossEntropyLoss(), True))
    ):
        learn.loss_func = loss_func
        log = quiet_fit(learn, 4, 0.1).sb.log
        assert (log.selected[log.fit == fit].min() < 1) == selects == learn.sb.remembers


def test_the_first_and_the_last_tenth_are_whole():
    log = quiet_fit(digits_learner().selective_backprop(), 10, 0.05).sb.log
    assert (log.selected == 1).tolist() == [True] + [False] * 8 + [True]
    assert (
        log.candidate_loss.notna().all() and log.candidate_loss.is_monotonic_decreasing
    )  # losses are remembered beside doubts


def test_wrong_labels_are_not_sought_out():
    "A third of the labels is wrong; of what is trained on, about a third: by loss it would be far more"
    x, y = digits(1000)
    wrong = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 1 / 3
    y = torch.where(wrong, (y + 1 + torch.arange(1000) % 9) % 10, y)

    class Count(Callback):
        def before_fit(self):
            self.share = []

        def before_batch(self):
            if self.training and self.epoch > 1:
                self.share.append(wrong[self.learn.sb._rows].float().mean().item())

    shares = {}
    for name, kw in {"default": {}, "loss": dict(selector=TopK(0.5))}.items():
        dls = DataLoaders.from_dsets(
            NoisyRows(x, y, 0.05), NoisyRows(x[:50], y[:50], 0), bs=50, device="cpu", num_workers=0
        )
        torch.manual_seed(1)
        count = Count()
        quiet_fit(
            Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat(), cbs=count).selective_backprop(end=1.0, **kw),
            8,
        )
        shares[name] = np.mean(count.share)
    assert 0.25 < shares["default"] < 0.42 and shares["loss"] > 0.5


def test_mixup_is_not_scored_where_all_is_kept(capsys):
    learn = digits_learner(cbs=MixUp()).selective_backprop(beta=0)
    with learn.no_bar():
        learn.fit(1)
    assert learn.sb.counts["fp"] == 0 and "fastsb" not in capsys.readouterr().out


@pytest.mark.parametrize("mix,least", [(MixUp(), 1.0), (CutMix(), 0.5)])
def test_what_is_mixed_is_remembered_for_the_rows_own_item(mix, least, capsys):
    """The predictions and the targets that it had before it was mixed; of CutMix only where the own image has the
    greater part"""
    x, y = digits(320)
    dls = DataLoaders.from_dsets(
        NoisyRows(x.reshape(-1, 1, 8, 8), y, 0),
        NoisyRows(x.reshape(-1, 1, 8, 8), y, 0),
        bs=32,
        device="cpu",
        num_workers=0,
    )

    class Book(Callback):
        order = 70

        def before_fit(self):
            self.loss, self.doubt, self.sure = np.full(320, np.nan), np.full(320, np.nan), []

        def after_loss(self):
            if not self.training:
                return
            rows, pred = self.learn.sb._rows.numpy(), self.pred.detach().double()
            lam = mix.lam.reshape(-1).expand(len(rows)).numpy()
            self.sure.append((lam >= 0.5).mean())
            for old, new in (
                (self.loss, nn.functional.cross_entropy(pred, y[rows], reduction="none").numpy()),
                (self.doubt, entropy(pred.numpy(), None)),
            ):
                old[rows] = np.where(lam < 0.5, old[rows], np.where(np.isnan(old[rows]), new, (old[rows] + new) / 2))

    book = Book()
    torch.manual_seed(0)
    learn = Learner(
        dls, nn.Sequential(nn.Flatten(), digits_model(p=0)), loss_func=CrossEntropyLossFlat(), cbs=[mix, book]
    ).selective_backprop()
    with learn.no_bar():
        learn.fit(10, 0.02)
    memory = learn.sb.sampler.memory
    np.testing.assert_allclose(memory.losses(), book.loss, rtol=1e-4)
    np.testing.assert_allclose(memory.doubts(), book.doubt, rtol=1e-4)
    selected = learn.sb.log.selected
    assert learn.sb.counts["fp"] == 0 and selected[[0, 9]].tolist() == [1.0, 1.0] and selected[1:9].min() < 0.9
    assert (
        np.mean(book.sure) >= least
        and (np.mean(book.sure) < 1) == (least < 1)
        and "fastsb" not in capsys.readouterr().out
    )


def test_targets_that_are_mixed_too_are_remembered_unmixed():
    "Of a loss that takes probabilities MixUp mixes the targets; what is remembered is by the row's own"
    x, y = digits(320)
    hot = nn.functional.one_hot(y, 10).float()
    dls = DataLoaders.from_dsets(NoisyRows(x, hot, 0), NoisyRows(x, hot, 0), bs=32, device="cpu", num_workers=0)
    mix = MixUp()
    learn = Learner(dls, digits_model(p=0), loss_func=nn.BCEWithLogitsLoss(), cbs=mix).selective_backprop()
    last = {}

    class Watch(Callback):
        order = 70

        def after_loss(self):
            if self.training:
                rows = self.learn.sb._rows
                assert not torch.equal(self.yb[0], hot[rows])
                last.update(
                    zip(
                        rows.tolist(),
                        nn.functional.binary_cross_entropy_with_logits(self.pred, hot[rows], reduction="none")
                        .mean(1)
                        .tolist(),
                    )
                )

    quiet_fit(learn, 1, cbs=Watch())
    np.testing.assert_allclose(learn.sb.sampler.memory.losses(), [last[i] for i in range(320)], rtol=1e-4)


def test_a_loader_that_does_not_tell_its_items_is_trained_whole(capsys):
    "Nobody has asked for forward passes"
    dls = digits_learner().dls
    torch_dls = DataLoaders(
        *(torch.utils.data.DataLoader(d.dataset, 32, shuffle=True, drop_last=True) for d in dls.loaders)
    )
    learn = Learner(torch_dls, digits_model(), loss_func=CrossEntropyLossFlat()).selective_backprop()
    with learn.no_bar():
        learn.fit(10)
    out = capsys.readouterr().out
    assert learn.sb.counts["fp"] == 0 and learn.sb.log.selected.tolist() == [1.0] * 10
    assert out.count("fastsb:") == 1 and "everything is trained on. Nothing can be remembered of the items" in out
    assert quiet_fit(learn.selective_backprop(score="model"), 10).sb.counts["fp"] == 8 * 640


def test_forward_passes_find_the_same_half():
    "Where it has to score, Uncertainty chooses by the predictions of that pass"
    seen = []

    class Watch(Uncertainty):
        def select(self, losses, history=None, pred=None, **context):
            s = super().select(losses, history, pred=pred, **context)
            seen.append((entropy(pred.double().numpy(), None), s.idx.numpy()))
            return s

    quiet_fit(digits_learner(p=0).selective_backprop(selector=Watch(0.25), score="model", start=0), 2)
    assert len(seen) == 36 and all((np.sort(np.argsort(-h, kind="stable")[:8]) == idx).all() for h, idx in seen)


def test_a_fit_too_short_for_selection_says_so(capsys):
    class Stop(Callback):
        def after_epoch(self):
            raise CancelFitException

    says = "fastsb: nothing was left out"
    for n, kw, expected in [
        (1, {}, None),  # a stage of `fine_tune` needs no word
        (1, dict(paper=True), None),
        (
            2,
            {},
            says + ". Selection goes by what earlier epochs have shown and begins at 0.1 and ends at 0.9 (an int is "
            "epochs, a float a share of the fit), and this fit had 2 epochs: fit for longer, or let ",
        ),
        (2, dict(paper=True, start=2), says + ". Selection begins at 2 and ends at 1.0 (an int is epochs, "),
        (2, dict(start=3, end=1.0), "begins at 3 and ends at 1.0 (an int is epochs, a float a share of the fit), "),
        (2, dict(end=1.0), None),
        (3, {}, None),
        (1, dict(beta=1, score="model"), None),  # begins a tenth into the epoch
        (1, dict(beta=0), None),  # nothing was to be left out
    ]:
        learn = digits_learner().selective_backprop(**kw)
        with learn.no_bar():
            learn.fit(n, 0.05)
        out = capsys.readouterr().out
        assert expected in out if expected else says not in out, (kw, out)
        assert (learn.sb.log.selected < 1).any() == (
            expected is None and kw != dict(beta=0) and (n > 1 or "score" in kw)
        ), kw
    quiet_fit(digits_learner().selective_backprop(), 1)
    learn = digits_learner(cbs=Stop()).selective_backprop()
    with learn.no_bar():
        learn.fit(10)  # ended by someone else
        learn.lr_find(show_plot=False)
    assert says not in capsys.readouterr().out


def test_what_fits_no_memory_is_scored_without_a_word(capsys):
    "`stale`, and selectors that need predictions, ask for forward passes"
    from fastsb.select import GradNorm

    for kw in (dict(stale=2, start=1, end=1.0), dict(selector=GradNorm(3, tau=1.0), start=1)):
        learn = digits_learner().selective_backprop(**kw)
        with learn.no_bar():
            learn.fit(4, 1e-2)
        assert learn.sb.counts["fp"] > 0 and "fastsb: every" not in capsys.readouterr().out


def test_paper():
    "Forward passes from the second epoch to the last, percentiles, coins; single settings can be replaced"
    a = quiet_fit(digits_learner().selective_backprop(paper=True, seed=0), 3)
    b = quiet_fit(digits_learner().selective_backprop(**paper_settings, seed=0), 3)
    assert repr(a.sb.selector) == "Percentile(beta=1)" and torch.equal(weights(a), weights(b))
    assert a.sb.counts["fp"] == 2 * 640 and a.sb.log.selected[0] == 1 and not a.sb.selector.exact
    sb = digits_learner().selective_backprop(paper=True, beta=3, stale=3).sb
    assert repr(sb.selector) == "Percentile(beta=3)" and sb.way.stale == 3
    assert (sb.window.start, sb.window.end) == (1, 1.0)
    assert digits_learner().selective_backprop(paper=True, selector=TopK(0.2)).sb.selector.keep == 0.2
    with pytest.raises(TypeError, match="paper='yes' must be"):
        digits_learner().selective_backprop(paper="yes")


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(exact=False), "pass beta= too"),
        (dict(exact="no"), "exact='no'"),
        (dict(seed="x"), "seed='x'"),
        (dict(score="cash"), "score='cash' must be one of 'auto'"),
        (dict(score=Doubtful(), selector=Uncertainty(0.5)), "does not choose by loss: use TopK"),
        (dict(start=0.9), "end=0.9 must come after start=0.9"),
    ],
)
def test_faults(kw, says):
    with pytest.raises((TypeError, ValueError), match=says.replace("(", r"\(")):
        digits_learner().selective_backprop(**kw)


def test_no_cap_on_doubt():
    with pytest.raises(ValueError, match="does not choose by loss"):
        Capped(Uncertainty(0.5))
    assert Capped(Percentile(1.0)).by_loss


def test_it_is_what_the_callback_is():
    a = weights(quiet_fit(digits_learner().selective_backprop(), 4))
    assert torch.equal(a, weights(quiet_fit(digits_learner(cbs=SelectiveBackpropCallback()), 4)))


def test_doubtful_alone_chooses_by_loss():
    assert repr(digits_learner().selective_backprop(score=Doubtful()).sb.selector) == "TopK(keep=0.5)"
    assert (
        repr(digits_learner().selective_backprop(score=lambda model, batch: batch[0].mean(1)).sb.selector)
        == "TopK(keep=0.5)"
    )


class Norms(Callback):
    "Of the first BatchNorm: its running mean before and after each epoch's training; does it use it there?"

    def norm(self):
        return next(m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def before_fit(self):
        self.rows, self.used = [], []

    def before_train(self):
        self.used = []
        self.old = self.norm().running_mean.clone()

    def before_batch(self):
        if self.training:
            self.used.append(not self.norm().training)

    def after_train(self):
        same = torch.equal(self.old, self.norm().running_mean)
        self.rows.append((same, all(self.used), any(self.used)))


def image_model():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize(
    "kw", [{}, dict(beta=1, score="model"), dict(selector="topk")], ids=["default", "scored", "topk"]
)
def test_in_the_last_stretch_statistics_of_rows_stay_as_they_are(kw):
    """BatchNorm1d goes on with what it has seen of the selected; nothing of it is left when the fit is over. Neither
    images' norms, nor a fit in which nothing is left out, nor selection to the end know of it"""
    moves, held = (False, False, False), (True, True, True)
    learn = quiet_fit(digits_learner(cbs=Norms()).selective_backprop(**kw), 10, 0.05)
    assert learn.norms.rows == [moves] * 9 + [held]
    assert all(m.training for m in learn.model.train().modules())
    learn.fit(1, 0.01)
    assert learn.norms.rows == [moves]
    for change in (
        lambda: digits_learner(cbs=Norms(), model=image_model()).selective_backprop(**kw),
        lambda: digits_learner(cbs=Norms()).selective_backprop(**kw, end=1.0),
        lambda: digits_learner(cbs=Norms()).selective_backprop(beta=0),
        lambda: digits_learner(cbs=Norms()),
    ):
        assert quiet_fit(change(), 10, 0.05).norms.rows == [moves] * 10


def test_statistics_are_not_held_beyond_a_fit_that_fails():
    "An error in the last stretch: the norms train again, as they would have without fastsb"

    class Fails(Callback):
        def before_backward(self):
            if self.epoch == 9 and self.iter == 3:
                norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm1d)]
                self.learn.was_held = not any(m.training for m in norms)
                raise OSError("no power")

    learn = digits_learner(cbs=Fails()).selective_backprop()
    with pytest.raises(OSError, match="no power"):
        quiet_fit(learn, 10, 0.05)
    assert learn.was_held and all(m.training for m in learn.model.modules())
