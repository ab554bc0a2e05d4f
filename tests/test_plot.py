"fastsb.plot: what the pictures show, against numbers; nothing is cut off or shown by itself, on light and dark ground"
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from common import digits_learner, quiet_fit
from fastai.callback.core import Callback
from matplotlib.colors import to_hex, to_rgb

from fastsb.callback import SelectiveBackpropCallback
from fastsb.record import seconds_columns
from fastsb.plot import (
    ShowSelected,
    compare,
    method_styles,
    pareto,
    plot_bands,
    plot_probability,
    plot_seconds,
    plot_shares,
)
from fastsb.record import band_levels
from fastsb.select import Absolute, InfoBatch, LowK, OrderedPool, Percentile, Random, Threshold, TopK, Uncertainty


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    "Nothing calls `show`, and no figure stays open"
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('show was called'))
    monkeypatch.setattr(plt.Figure, 'show', lambda *a, **k: pytest.fail('show was called'))
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def fits():
    return dict(plain=quiet_fit(digits_learner().selective_backprop(beta=0), 5),
                default=quiet_fit(digits_learner().selective_backprop(), 5),
                paper=quiet_fit(digits_learner().selective_backprop(paper=True), 5))


def log_of(n=4, bp=60, seed=0, **kwargs):
    "A log as `fastsb_train` writes it"
    acc, bp = 50 + 10*np.sqrt(np.arange(1, n+1)) + seed, np.array(bp)
    cols = dict(epoch=np.arange(1, n+1), candidates=100, fp=0, bp=bp, selected=bp/100, loads=bp,
                score_age=1.5, oldest=3, held=.7,
                loading_s=1., scoring_s=0., training_s=2., seconds=4.*np.arange(1, n+1), test_acc=acc, test_loss=1/acc)
    return pd.DataFrame({**cols, **kwargs})


heights = lambda bars: np.array([p.get_height() for p in bars])
legend = lambda ax: [t.get_text() for t in ax.get_legend().get_texts()]


# ---- what was trained on
def test_shares_add_up():
    log = log_of(bp=[100, 40, 30, 100], selected=[1, .4, .3, 1], loads=[100, 40, 80, 100], fp=[0, 0, 80, 0])
    trained, left_out, not_loaded = plot_shares(log).containers
    assert np.allclose(heights(trained), [1, .4, .3, 1]) and np.allclose(heights(left_out), [0, 0, .5, 0])
    assert np.allclose(heights(not_loaded), [0, .6, .2, 0])
    assert [p.get_x() for p in trained] == [0, 1, 2, 3]


def test_shares_show_dots_only_where_batches_were_scored():
    log = log_of(fp=[0, 100, 0, 100], loads=100)
    ax = plot_shares(log, [0, .5, 1, 1.5, 2, 3.5, 4.], [1, 1, .4, .6, .9, .3, .2], keep=.5)
    dots, line, held = ax.lines
    assert held.get_ydata().tolist() == [.7]*4 and 'share of the loss that it holds' in legend(ax)
    assert dots.get_xdata().tolist() == [1, 1.5, 3.5, 4.] and dots.get_ydata().tolist() == [.4, .6, .3, .2]
    assert line.get_ydata() == [.5, .5] and 'expected: 0.50' in legend(ax)


def test_a_log_of_several_fits_shows_the_last():
    log = pd.concat([log_of(3, fit=0), log_of(2, fit=1)])
    assert len(plot_shares(log).containers[0]) == 2


def test_the_methods_of_the_callback(fits):
    for name, learn in fits.items():
        log = learn.sb.log
        assert np.allclose(heights(learn.sb.plot_selected().containers[0]), log.selected), name
        bars = {c.get_label().split()[0]: heights(c) for c in learn.sb.plot_time().containers}
        known = log.assign(selecting_s=log.selecting_s + log.training_s - log.forward_s - log.backward_s)
        for part, secs in bars.items(): assert np.allclose(secs, known[f'{part}_s']), (name, part)
        assert np.allclose(sum(bars.values()), log[list(seconds_columns)].sum(axis=1)), name
        assert ('scoring' in bars) == (name == 'paper')
    assert 'not loaded' in ' '.join(legend(fits['default'].sb.plot_selected()))
    assert legend(fits['plain'].sb.plot_selected()) == ['trained on']
    with pytest.raises(ValueError, match='fit first'): digits_learner().selective_backprop().sb.plot_selected()
    with pytest.raises(ValueError, match='fit first'): digits_learner().selective_backprop().sb.plot_time()


def test_the_legend_says_how_old_the_scores_were(fits):
    log = fits['default'].sb.log
    words = ' '.join(legend(fits['default'].sb.plot_selected()))
    assert f'{log.oldest.max()} at most' in words and log.oldest.max() >= log.score_age.max() > 0
    assert 'share of the doubt that it holds' in words
    assert 'share of the loss' in ' '.join(legend(fits['paper'].sb.plot_selected()))
    for learn in fits.values():
        log = learn.sb.log
        assert not (log.held[log.selected == 1] < 1).any()


# ---- what it was chosen from
def test_bands_of_what_is_remembered_at_the_start_of_each_epoch():
    """Against the memory itself, which is looked at before each epoch"""
    seen = {}

    class Look(Callback):
        order = SelectiveBackpropCallback.order + 1

        def before_train(self):
            sampler = self.learn.sb.sampler
            if sampler.chosen is not None: seen[self.epoch] = sampler.memory.doubts().numpy(), sampler.chosen.numpy()

    learn = quiet_fit(digits_learner(cbs=Look()).selective_backprop(), 6)
    bands = learn.sb.record.bands['doubt']
    found = {x: y for x, y in zip(bands.x, bands.y) if x in seen}
    assert len(found) == len(seen) == 4
    for epoch, (doubts, chosen) in seen.items():
        want = [np.nanquantile(d, band_levels, method='nearest') for d in (doubts, doubts[chosen])]
        np.testing.assert_allclose(found[epoch], np.concatenate(want), rtol=1e-6)
        held = np.nansum(doubts[chosen])/np.nansum(doubts)
        assert learn.sb.log.held[epoch] == pytest.approx(held, rel=1e-5)
    ax = learn.sb.plot_losses()
    assert ax.get_ylabel() == 'doubt (nats)' and learn.sb.plot_losses('loss').get_ylabel() == 'loss'
    every, kept = ax.lines
    assert np.isnan(kept.get_ydata()).sum() == 2 and len(every.get_xdata()) == 6 and ax.get_xlim() == (0, 6)


def test_bands_of_scored_batches():
    "Chosen are the highest half: half of them lie above three quarters of all"
    learn = quiet_fit(digits_learner().selective_backprop(selector=TopK(.5), score='model', start=1, end=1.), 3)
    bands = np.array(learn.sb.record.bands['loss'].y)
    assert learn.sb.record.bands['loss'].x == pytest.approx([.475, 1.475, 2.475])
    assert np.isnan(bands[0, 5:]).all() and (bands[1:, 5] > bands[1:, 1]).all()
    np.testing.assert_allclose(bands[1:, 7], bands[1:, 3], rtol=.1)
    assert (learn.sb.log.held[1:] > .5).all() and learn.sb.log.held[0] == 1
    with pytest.raises(ValueError, match=r"only by doubt where it is remembered. There is plot_losses\('loss'\)"):
        learn.sb.plot_losses('doubt')


def test_bands_faults(fits):
    with pytest.raises(ValueError, match='No loss of candidates was looked at'): fits['plain'].sb.plot_losses()
    with pytest.raises(ValueError, match="by='age'"): fits['default'].sb.plot_losses('age')
    with pytest.raises(ValueError, match='fit first'): digits_learner().selective_backprop().sb.plot_losses()


# ---- while it trains
def test_show_selected_draws_in_one_place(monkeypatch, capsys):
    shown, updates = [], []

    class Handle:
        def update(self, figure): updates.append(figure)

    monkeypatch.setattr('IPython.display.display', lambda fig, display_id: shown.append(fig) or Handle())
    learn = digits_learner().selective_backprop()
    with learn.no_logging(): learn.fit(3, 1e-2, cbs=ShowSelected())
    assert not shown, 'in a script it does nothing'
    monkeypatch.setattr('fastsb.plot.in_notebook', lambda: True)
    quiet_fit(learn, 2, cbs=ShowSelected())
    quiet_fit(digits_learner(), 2, cbs=ShowSelected())
    assert not shown, 'without a progress bar, or without selection, it does nothing'
    with learn.no_logging(): learn.fit(3, 1e-2, cbs=ShowSelected())
    assert len(shown) == 1 and len(updates) == 2 and not plt.get_fignums()
    ax = updates[-1].axes[0]
    assert len(ax.containers[0]) == 3 and ax.get_xlim() == shown[0].axes[0].get_xlim() == (0, 3)


# ---- where the seconds went
def test_seconds_are_stacked_and_all_accounted_for():
    log = log_of(scoring_s=[0, .5, .5, 0])
    ax = plot_seconds(log)
    parts = {c.get_label().split()[0]: heights(c) for c in ax.containers}
    assert list(parts) == ['loading', 'scoring', 'training', 'other']
    assert np.allclose(sum(parts.values()), 4) and np.allclose(parts['other'], [1, .5, .5, 1])
    tops = np.array([[p.get_y() for p in c] for c in ax.containers])
    assert np.allclose(tops, np.cumsum([np.zeros(4), *list(parts.values())[:3]], 0))
    assert '16.0 s in all' in ax.get_title() and 'training 8 s' in legend(ax)
    assert 'other' not in ' '.join(legend(plot_seconds(log.drop(columns='seconds'))))


def test_seconds_beside_a_plain_fit():
    ax = plot_seconds(log_of(4), plain=log_of(6, seconds=7.*np.arange(1, 7)))
    names = [c.get_label() for c in ax.containers]
    assert 'plain: training 12.0 s' in names and 'training 8 s' in names and '42.0 s plain' in ax.get_title()
    spans = {n: [(p.get_x(), p.get_x()+p.get_width()) for p in c] for n, c in zip(names, ax.containers)}
    plain, fit = spans['plain: training 12.0 s'], spans['training 8 s']
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(plain, fit)) and len(plain) == 6 and ax.get_xlim() == (0, 6)


# ---- what a selector does
@pytest.mark.parametrize('selector,curve', [
    (Percentile(1.), lambda q: q), (Percentile(3.), lambda q: q**3), (Random(.3), lambda q: 0*q + .3),
    (TopK(.2), lambda q: q >= .8), (LowK(.2), lambda q: q < .2), (Threshold(.9), lambda q: 2*q > .9),
    (Uncertainty(.5), lambda q: q >= .5),
    (InfoBatch(.5), lambda q: np.where(q < .495, .5, 1.))])
def test_probability(selector, curve):
    q = torch.arange(100)/100
    shuffled = 2*q[torch.randperm(100)]
    x, p = plot_probability(selector, shuffled).lines[0].get_data()
    assert np.allclose(x, 2*q) and np.allclose(p, curve(q.numpy()), atol=1e-5)


def test_probability_of_what_is_drawn_anew():
    q, p = plot_probability(OrderedPool(pool=.75, keep=.5), torch.arange(200.)).lines[0].get_data()
    assert p[:40].max() < .05 and np.allclose(p[100:], .75, atol=.08)   # of a pool of 150 the highest 100


def test_probability_leaves_the_selector_and_the_generators_alone():
    s, t = Random(.5, seed=1), Random(.5, seed=1)
    s.uniform(3, 'cpu'), t.uniform(3, 'cpu')
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    plot_probability([s, Percentile(1., exact=True)])
    assert torch.rand(1) == before and torch.equal(s.uniform(5, 'cpu'), t.uniform(5, 'cpu'))


def test_probability_of_what_needs_more_than_a_loss():
    with pytest.raises(ValueError, match=r'Absolute\(\) does not go by the loss alone'): plot_probability(Absolute())


# ---- which was worth it
@pytest.mark.parametrize('seed', range(20))
def test_pareto(seed):
    rng = np.random.default_rng(seed)
    cost, value = rng.integers(0, 6, 12), rng.integers(0, 6, 12)
    points = list(zip(cost, value))
    beats = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    unbeaten = {p for p in points if not any(beats(q, p) for q in points)}
    front = [points[i] for i in pareto(cost, value)]
    assert set(front) == unbeaten and len(front) == len(unbeaten) and front == sorted(front)


def test_compare_learners(fits):
    seconds, backprops = compare(fits)
    for learn, line in zip(fits.values(), [ln for ln in backprops.lines if ln.get_marker() == 'None'][:3]):
        assert line.get_xdata().tolist() == learn.sb.log.bp.cumsum().tolist()
        assert np.allclose(line.get_ydata(), [100*v[2] for v in learn.recorder.values])
    assert backprops.get_xlabel() == 'backprops' and seconds.get_xlabel() == 'seconds'
    assert seconds.get_ylabel() == 'accuracy (%)'
    assert legend(backprops) == [f'{n} (one run)' for n in fits] + ['front']
    ax = compare(fits, metric='valid_loss', less_is_better=True, against='seconds')
    assert ax.get_ylabel() == 'valid_loss'


def test_compare_shows_each_seed_and_their_mean():
    ax = compare({'plain': [log_of(seed=s) for s in (0, 2, 4)], 'default': log_of(bp=30)}, against='backprops')
    seeds = next(ln for ln in ax.lines if ln.get_marker() == '.')
    assert np.allclose(sorted(seeds.get_ydata()), [70, 72, 74])
    assert legend(ax)[:2] == ['plain (3 runs)', 'default (one run)']
    mean = next(ln for ln in ax.lines if ln.get_label() == 'plain (3 runs)')
    assert mean.get_xydata().tolist() == [[240, 72]]
    assert len([ln for ln in ax.lines if ln.get_marker() == '.']) == 1   # one seed has no spread to show


def test_compare_tells_lengths_from_seeds():
    ax = compare({'plain': [log_of(4), log_of(9), log_of(9, seed=2)]}, against='seconds')
    ends = next(ln for ln in ax.lines if ln.get_label() == 'plain (3 runs)')
    assert ends.get_xydata().tolist() == [[16, 70], [36, 81]]
    front = next(ln for ln in ax.lines if ln.get_label() == 'front')
    assert front.get_xydata().tolist() == [[16, 70], [36, 81]]


def test_the_front_of_a_loss_is_the_lowest():
    logs = {'a': log_of(), 'b': log_of(bp=80, seed=-5)}
    ax = compare(logs, metric='test_loss', less_is_better=True, against='backprops')
    front = next(ln for ln in ax.lines if ln.get_label() == 'front')
    assert np.allclose(front.get_xydata(), [[240, 1/70]])


def test_compare_faults(fits):
    with pytest.raises(ValueError, match="metric='f1' must be a column"): compare({'a': log_of()}, metric='f1')
    with pytest.raises(ValueError, match=r'beta=0'): compare({'a': quiet_fit(digits_learner(), 1)})
    with pytest.raises(ValueError, match='fits'): compare({})
    with pytest.raises(ValueError, match='against'): compare({'a': log_of()}, against='epochs')
    with pytest.raises(ValueError, match='ax must be 2 axes'): compare({'a': log_of()}, ax=plt.subplots()[1])
    with pytest.raises(ValueError, match='log is empty'): plot_shares(log_of()[:0])


# ---- how they look
def test_a_method_keeps_its_colour_and_marker():
    a, b = method_styles(['plain', 'default', 'mine']), method_styles(['paper', 'default', 'plain', 'yours', 'mine'])
    assert a['plain'] == b['plain'] and a['default'] == b['default']
    many = method_styles([*b, *map(str, range(20))])
    assert len(set(many.values())) == len(many)
    assert method_styles(['sb', 'nofilter']) == dict(sb=method_styles(['paper'])['paper'], nofilter=a['plain'])


BANDS = [[1, 2, 3, 4, 5] + 5*[np.nan], [1, 2, 3, 4, 5, 2, 3, 4, 4, 5], [0, 1, 2, 3, 4, 2, 2, 3, 3, 4]]
RUNS = {'plain': [log_of(), log_of(seed=1)], 'a method with a longer name': log_of(bp=30)}
PICTURES = dict(
    shares=lambda **kw: plot_shares(log_of(fp=60), [.5, 1.5], [.4, .6], .5, **kw),
    bands=lambda **kw: plot_bands([.5, 1, 2], BANDS, 'doubt', **kw),
    seconds=lambda **kw: plot_seconds(log_of(scoring_s=1.), plain=log_of(), **kw),
    probability=lambda **kw: plot_probability([Percentile(1.), Percentile(3.), TopK(.5)], **kw),
    compare=lambda **kw: compare(RUNS, against='seconds', **kw),
    both=lambda **kw: compare(RUNS, **kw)[0])


def luminance(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= .03928, rgb/12.92, ((rgb+.055)/1.055)**2.4) @ [.2126, .7152, .0722]


@pytest.mark.parametrize('style', ['default', 'dark_background'])
@pytest.mark.parametrize('name', PICTURES)
def test_nothing_is_cut_off_and_all_can_be_seen(name, style):
    with plt.style.context(style):
        ax = PICTURES[name]()
        fig = ax.figure
        fig.savefig(io.BytesIO(), bbox_inches=None)
        frame = fig.bbox.padded(1)
        for a in fig.axes:
            assert a.get_xlabel() and a.get_ylabel() and a.get_title()
            box = a.get_tightbbox()
            assert box.x0 >= frame.x0 and box.y0 >= frame.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
        ground = luminance(plt.rcParams['axes.facecolor'])
        for a in fig.axes:
            for line in a.lines:
                hi, lo = sorted([luminance(to_hex(line.get_color())), ground], reverse=True)
                assert (hi+.05)/(lo+.05) > 2, (name, line.get_color())


@pytest.mark.parametrize('name', [n for n in PICTURES if n != 'both'])
def test_axes_of_ones_own(name):
    ax = plt.subplots()[1]
    assert PICTURES[name](ax=ax) is ax and len(plt.get_fignums()) == 1


def test_a_plain_fit_is_given_by_its_log(fits):
    learn = next(iter(fits.values()))
    with pytest.raises(TypeError, match="plain must be a log, such as another learner's learn.sb.log, not a Learner"):
        learn.sb.plot_time(plain=learn)
