"fastsb.items: what is remembered of each item, the items themselves, and wrong labels, for all kinds of data sets"
import random

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from common import digits, digits_learner, fresh, quiet_fit
from fastai.basics import DataLoaders, Learner, set_seed
from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, RandomSplitter, TabularPandas
from fastai.tabular.all import tabular_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.text.all import TextBlock
from fastai.vision.all import DataBlock, ImageBlock, MaskBlock, MultiCategoryBlock, PILImageBW, PILMask
from torch import nn

from fastsb.all import *
from fastsb.data import image_dls


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('show was called'))
    yield
    plt.close('all')


def model(n_in, n_out): return nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out))


def fitted(dls, net, epochs=3, loss_func=None, **kwargs):
    learn = Learner(dls, net, loss_func=loss_func or CrossEntropyLossFlat()).selective_backprop(**kwargs)
    return quiet_fit(learn, epochs)


class Counts(torch.utils.data.Dataset):
    "Three items of each class, which it has only with its inputs"
    def __init__(self, n): self.n, self.loads = n, 0
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.loads += 1
        return torch.rand(4), torch.tensor(i//3)


def image_block(n=80, classes=('zero', 'one', 'two'), blocks=None, get_y=None, **kwargs):
    rng = np.random.default_rng(0)
    pixels, y = rng.integers(0, 255, (n, 8, 8), dtype=np.uint8), rng.integers(0, 3, n)
    block = DataBlock(
        blocks=blocks or (ImageBlock(PILImageBW), CategoryBlock), get_x=lambda i: PILImageBW.create(pixels[i]),
        get_y=get_y or (lambda i: classes[y[i]]), splitter=RandomSplitter(seed=3))
    dls = block.dataloaders(range(n), bs=16, num_workers=0, device='cpu')
    return dls, [classes[y[i]] for i in dls.train_ds.items]


# ---- a row an item
def test_a_row_an_item():
    learn = quiet_fit(digits_learner().selective_backprop(), 5)
    df, memory, log = learn.sb.items(), learn.sb.sampler.memory, learn.sb.log
    assert list(df.columns) == ['label', 'loss', 'doubt', 'trained', 'last_epoch']
    assert df.index.tolist() == [*range(640)]
    assert df.label.tolist() == digits(640)[1].tolist()
    assert df.trained.sum() == log.bp.sum() and df.trained.between(1, 5).all()
    np.testing.assert_array_equal(df.loss, memory.losses())
    np.testing.assert_array_equal(df.doubt, memory.doubts())
    assert (df.last_epoch == 4).all(), 'the last epoch is whole'


def test_epochs_are_counted_over_all_fits():
    learn = quiet_fit(digits_learner().selective_backprop(end=1.), 4)
    assert learn.sb.items().last_epoch.max() == 3 and learn.sb.items().last_epoch.min() < 3
    quiet_fit(learn, 3)
    df = learn.sb.items()
    assert df.last_epoch.max() == 6 and df.trained.sum() == learn.sb.log.bp.sum()


def test_what_was_never_seen_has_no_numbers():
    learn = digits_learner().selective_backprop()
    quiet_fit(learn, 3)
    fresh_memory = ItemMemory(640)
    fresh_memory.update(torch.arange(10), torch.ones(10), torch.ones(10), epoch=2)
    learn.sb.sampler.memory = fresh_memory
    df = learn.sb.items(labels=False)
    assert df.loss.notna().sum() == df.doubt.notna().sum() == df.last_epoch.notna().sum() == df.trained.sum() == 10
    assert len(learn.sb.likely_wrong(times=1)) == 0 and (df.last_epoch[:10] == 2).all()


def test_nothing_remembered_is_one_clear_error():
    words = r'Nothing was remembered of the items in this fit, by SelectiveBackprop.*learn\.selective_backprop\(\)'
    for how in (dict(beta=0), dict(paper=True)):
        sb = quiet_fit(digits_learner().selective_backprop(**how), 2).sb
        for call in (sb.items, sb.show_items, sb.likely_wrong):
            with pytest.raises(ValueError, match=words): call()
    sb = quiet_fit(digits_learner().batch_loss_filter(), 2).sb
    with pytest.raises(ValueError, match='Nothing was remembered.*BatchLossFilter'): sb.items()
    for call in ('items', 'show_items', 'likely_wrong'):
        with pytest.raises(ValueError, match='fit first'): getattr(digits_learner().selective_backprop().sb, call)()


def test_of_a_callback_without_a_learner():
    cb = SelectiveBackpropCallback()
    quiet_fit(digits_learner(), 3, cbs=cb)
    assert len(cb.items(labels=False)) == 640
    with pytest.raises(ValueError, match='no learner any more'): cb.items()


def test_of_another_loader():
    learn = quiet_fit(digits_learner().selective_backprop(), 3)
    learn.dls = digits_learner(n=320).dls
    with pytest.raises(ValueError, match='has 320 items now, but what is remembered is of 640'): learn.sb.items()


# ---- labels
def test_labels_of_a_data_block_are_decoded_without_loading_an_image(monkeypatch):
    dls, labels = image_block()
    learn = fitted(dls, model(64, 3))
    monkeypatch.setattr(PILImageBW, 'create', lambda *a, **k: pytest.fail('an image was loaded'))
    assert learn.sb.items().label.tolist() == labels


def test_several_labels():
    words = [('a',), ('b', 'c'), ()]
    dls, _ = image_block(blocks=(ImageBlock(PILImageBW), MultiCategoryBlock), get_y=lambda i: list(words[i % 3]))
    learn = fitted(dls, model(64, 3), loss_func=BCEWithLogitsLossFlat(), beta=1, score='cached')
    assert learn.sb.items().label.tolist() == [words[i % 3] for i in dls.train_ds.items]
    assert learn.sb.items().doubt.isna().all()


def test_a_mask_is_no_label():
    dls, _ = image_block(
        blocks=(ImageBlock(PILImageBW), MaskBlock(codes=['x', 'y'])),
        get_y=lambda i: PILMask.create(np.full((8, 8), i % 2, np.uint8)))
    learn = fitted(dls, nn.Conv2d(1, 2, 1), loss_func=CrossEntropyLossFlat(axis=1), beta=1, score='cached')
    assert learn.sb.items().label.isna().all()
    axs = learn.sb.show_items(4)
    assert len(axs) == 4 and all('loss' in ax.get_title() for ax in axs)


def test_labels_of_tensors_and_of_items():
    y = torch.arange(60) % 3
    tensors = torch.utils.data.TensorDataset(torch.randn(60, 4), y)
    learn = fitted(DataLoaders.from_dsets(tensors, tensors, bs=8, device='cpu', num_workers=0), model(4, 3))
    assert learn.sb.items().label.tolist() == y.tolist()
    ds = Counts(60)
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    dls.vocab = [f'class {i}' for i in range(20)]
    learn = fitted(dls, model(4, 20))
    ds.loads, before = 0, torch.get_rng_state()
    assert learn.sb.items().label.tolist() == [f'class {i//3}' for i in range(60)]
    assert ds.loads >= 60 and torch.equal(before, torch.get_rng_state())
    ds.loads = 0
    learn.sb.items(labels=False)
    assert ds.loads == 0


def test_numbers_to_be_predicted():
    x = torch.linspace(0, 1, 60)[:, None]
    ds = torch.utils.data.TensorDataset(x, 2*x)
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    learn = fitted(dls, model(1, 1), loss_func=MSELossFlat(), beta=1, score='cached')
    assert np.allclose(learn.sb.items().label.tolist(), 2*x)


def table():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(age=rng.normal(40, 9, 120), job=rng.choice(['cook', 'clerk'], 120)))
    df['rich'] = np.where(df.age > 40, 'yes', 'no')
    to = TabularPandas(df, [Categorify, FillMissing, Normalize], cat_names=['job'], cont_names=['age'], y_names='rich',
                       y_block=CategoryBlock(), splits=RandomSplitter(seed=1)(range(120)))
    return df, to, to.dataloaders(bs=16, device='cpu')


def test_a_table(capsys):
    df, to, dls = table()
    learn = quiet_fit(tabular_learner(dls, layers=[8]).selective_backprop(), 4)
    known, rows = learn.sb.items(), df.loc[to.train.items.index]
    assert known.label.tolist() == rows.rich.tolist()
    shown = learn.sb.show_items(least=5)
    assert shown.shape[0] == 5 and {'job', 'age', 'rich', 'trained', 'loss'} <= set(shown.columns)
    its = rows.iloc[shown.index.tolist()]
    assert shown.job.tolist() == its.job.tolist() and shown.rich.tolist() == its.rich.tolist()
    np.testing.assert_allclose(shown.age, its.age, rtol=1e-4)
    assert shown.trained.tolist() == known.trained.iloc[shown.index.tolist()].tolist()


def test_a_text():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(['good', 'bad', 'film'], 6)) for _ in range(80)]))
    df['label'] = np.where(df.text.str.startswith('good'), 'pos', 'neg')
    df['is_valid'] = np.arange(80) >= 64
    block = DataBlock((TextBlock.from_df('text'), CategoryBlock), get_x=lambda r: r.text, get_y=lambda r: r.label,
                      splitter=lambda d: (list(range(64)), list(range(64, 80))))
    dls = block.dataloaders(df, bs=16, seq_len=8, num_workers=0, device='cpu')
    net = nn.Sequential(nn.Embedding(len(dls.vocab[0]), 3), Pool(), nn.Linear(3, 2))
    learn = fitted(dls, net)
    assert learn.sb.items().label.tolist() == df.label[:64].tolist()
    shown = learn.sb.show_items(items=[5, 2])
    assert shown.category.tolist() == df.label[[5, 2]].tolist() and shown['index'].tolist() == [5, 2]
    assert all(t in s for t, s in zip(df.text[[5, 2]], shown.text))


class Pool(nn.Module):
    def forward(self, x): return x.mean(1)


# ---- the examples themselves
def images():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (100, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 100)
    return x, y, image_dls(x, y, x[:20], y[:20], bs=16, augment=True, device='cpu')


def test_shows_what_is_asked_for_and_as_it_is():
    x, y, dls = images()
    learn = fitted(dls, model(192, 3), 5)
    known = learn.sb.items()
    assert known.label.tolist() == [str(i) for i in y]
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for how, best in (dict(most=5), False), (dict(least=5), True), ({}, False):
        axs = learn.sb.show_items(**how)
        want = known.sort_values(['trained', 'loss'], ascending=best, kind='stable').iloc[:len(axs)]
        assert len(axs) == (5 if how else 9)
        for ax, (i, row) in zip(axs, want.iterrows()):
            title = [row.label, f'item {i}, loss {row.loss:.2f}', f'trained {row.trained} times']
            assert ax.get_title().split('\n') == title
            np.testing.assert_allclose(ax.images[0].get_array(), x[i], atol=1)
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert dls.train.dataset.split_idx == 0, 'the loader is as it was'


def test_axes_of_ones_own():
    learn = fitted(images()[2], model(192, 3))
    fig, axs = plt.subplots(1, 3)
    assert learn.sb.show_items(items=[4, 1, 4], ctxs=list(axs)) == list(axs) and len(plt.get_fignums()) == 1
    assert [ax.get_title().split(',')[0].split('\n')[1] for ax in axs] == ['item 4', 'item 1', 'item 4']


def test_show_items_faults():
    sb = fitted(images()[2], model(192, 3)).sb
    with pytest.raises(ValueError, match='one of most, least and items, not most and'): sb.show_items(3, items=[1])
    with pytest.raises(ValueError, match='least=0'): sb.show_items(least=0)
    with pytest.raises(TypeError, match='most=2.5'): sb.show_items(2.5)
    for wrong in ([100], [-1], []):
        with pytest.raises(ValueError, match='from 0 to 99'): sb.show_items(items=wrong)
    with pytest.raises(ValueError, match='do not know how to show themselves'):
        quiet_fit(digits_learner().selective_backprop(), 3).sb.show_items()


# ---- wrong labels
def test_likely_wrong_finds_planted_ones():
    x, y = digits(740)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(640)[:40]
    y[wrong] = (y[wrong] + 1 + torch.from_numpy(rng.integers(0, 9, 40))) % 10
    for how in ({}, dict(beta=1., score='cached')):
        set_seed(1)
        train, valid = (torch.utils.data.TensorDataset(x[s], y[s]) for s in (slice(640), slice(640, None)))
        dls = DataLoaders.from_dsets(train, valid, bs=32, device='cpu', num_workers=0)
        learn = fitted(dls, nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), 10, **how)
        found = learn.sb.likely_wrong(40)
        assert found.index.isin(wrong)[:20].mean() >= .9 and found.index.isin(wrong).mean() >= .7
        assert found.loss.is_monotonic_decreasing and (found.trained >= 2).all()
        assert found.label.tolist() == y[found.index.tolist()].tolist()


def test_likely_wrong_against_its_definition():
    learn = quiet_fit(digits_learner().selective_backprop(), 6)
    loss, doubt, trained = learn.sb.items(labels=False)[['loss', 'doubt', 'trained']].to_numpy().T
    want = [i for i in np.argsort(-loss, kind='stable') if loss[i] > doubt[i] and trained[i] >= 4]
    assert learn.sb.likely_wrong(10_000, times=4).index.tolist() == want and 0 < len(want) < 640
    assert learn.sb.likely_wrong(3, times=4).index.tolist() == want[:3]
    assert 'label' not in learn.sb.likely_wrong(3, labels=False)
    with pytest.raises(ValueError, match='n=0'): learn.sb.likely_wrong(0)
    with pytest.raises(ValueError, match='times=0'): learn.sb.likely_wrong(times=0)


def test_a_scoring_pass_that_remembers_tells_them_too():
    learn = quiet_fit(digits_learner().selective_backprop(**fresh(stale=2)), 4)
    assert learn.sb.items().loss.notna().all() and len(learn.sb.likely_wrong(5)) == 5
