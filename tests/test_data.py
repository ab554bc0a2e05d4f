"fastsb.data: arrays, loaders, augmentation and models, against NumPy and torchvision"
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, TensorImage, set_seed

from fastsb.data import (ArrayDL, ArrayDS, CropFlip, Cutout, check_arrays, folder_dls, get_model, image_dls,
                         load_arrays, models, wide_resnet)

rng = np.random.default_rng(0)


def arrays(n=50, m=20, sz=(8, 8, 3), c=4):
    im = lambda k: rng.integers(0, 256, (k, *sz), dtype=np.uint8)
    return dict(x_train=im(n), y_train=np.arange(n) % c, x_test=im(m), y_test=np.arange(m) % c)


def dls_of(a, **kwargs): return image_dls(*check_arrays(**a), **{'bs': 16, 'device': 'cpu', **kwargs})


# ---- load_arrays
def test_digits():
    from sklearn.datasets import load_digits
    d, (x, y, xt, yt) = load_digits(), load_arrays()
    assert x.dtype == xt.dtype == np.uint8 and y.dtype == yt.dtype == np.int64
    assert len(x) + len(xt) == 1797 and x.shape[1:] == xt.shape[1:] == (8, 8, 1)
    # together they are scikit-learn's images, each once, with its label
    key = lambda x, y: sorted(r.tobytes() + bytes([t]) for r, t in zip(x.reshape(len(x), 64), y))
    whole = np.round(d.images * 255 / 16).astype(np.uint8)
    assert key(np.concatenate([x, xt]), np.concatenate([y, yt])) == key(whole, d.target)
    assert np.allclose(np.bincount(yt)/len(yt), np.bincount(d.target)/1797, atol=0.003)   # as many of each digit
    assert all(np.array_equal(p, q) for p, q in zip(load_arrays(), (x, y, xt, yt)))


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.int64])
def test_npz(tmp_path, dtype):
    a = arrays()
    a['y_train'] = a['y_train'].astype(dtype)
    np.savez_compressed(tmp_path/'a.npz', extra=np.zeros(3), **a)
    got = load_arrays(data=str(tmp_path/'a.npz'))
    for g, k in zip(got, ('x_train', 'y_train', 'x_test', 'y_test')): assert np.array_equal(g, a[k])
    assert got[1].dtype == np.int64


def test_npz_grey(tmp_path):
    np.savez(tmp_path/'a.npz', **arrays(sz=(6, 5)))
    assert load_arrays(data=tmp_path/'a.npz')[0].shape == (50, 6, 5, 1)


u8 = np.uint8
faults = [
    (dict(x_train=None), ['x_train', 'y_train, x_test, y_test']),
    (dict(y_test=None, x_test=None), ['no x_test, y_test']),
    (dict(x_train=np.zeros((50, 8, 8, 3))), ['x_train', 'uint8', 'float64']),
    (dict(x_test=np.zeros((20, 8, 8, 3), np.int64)), ['x_test', 'uint8', 'int64']),
    (dict(x_train=np.zeros((50, 64), u8)), ['x_train', '(n,h,w,c)', '(50, 64)']),
    (dict(x_train=np.zeros((50, 3, 8, 8), u8)), ['x_train', '(n,h,w,c)', '(50, 3, 8, 8)']),
    (dict(x_train=np.zeros((0, 8, 8, 3), u8), y_train=np.zeros(0, int)), ['x_train', 'empty']),
    (dict(x_test=np.zeros((0, 8, 8, 3), u8), y_test=np.zeros(0, int)), ['x_test', 'empty']),
    (dict(x_test=np.zeros((20, 9, 8, 3), u8)), ['x_test', '(8, 8, 3)', '(9, 8, 3)']),
    (dict(x_test=np.zeros((20, 8, 8), u8)), ['x_test', '(8, 8, 3)', '(8, 8, 1)']),
    (dict(y_train=np.zeros(49, int)), ['y_train', '(50,)', '(49,)']),
    (dict(y_test=np.zeros((20, 1), int)), ['y_test', '(20,)', '(20, 1)']),
    (dict(y_train=np.zeros(50)), ['y_train', 'integer', 'float64']),
    (dict(y_train=np.full(50, True)), ['y_train', 'integer', 'bool']),
    (dict(y_test=np.full(20, -1)), ['y_test', '-1']),
    (dict(y_test=np.array([None]*20)), ['allow_pickle']),
]


@pytest.mark.parametrize('change,words', faults)
def test_npz_faults(tmp_path, change, words):
    f = tmp_path/'a.npz'
    np.savez(f, **{k: v for k, v in {**arrays(), **change}.items() if v is not None})
    with pytest.raises(ValueError) as e: load_arrays(data=f)
    for w in (str(f), *words): assert w in str(e.value)
    assert '\n' not in str(e.value)


def test_file_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.npz'): load_arrays(data=tmp_path/'none.npz')
    with pytest.raises(ValueError, match='subfolders of images are needed'): load_arrays(data=tmp_path)
    (tmp_path/'t.npz').write_text('not a zip')
    with pytest.raises(ValueError, match=r't.npz: not an .npz'): load_arrays(data=tmp_path/'t.npz')
    np.save(tmp_path/'one.npy', np.zeros(3))
    with pytest.raises(ValueError, match=r'one.npy: not an .npz'): load_arrays(data=tmp_path/'one.npy')
    np.savez(tmp_path/'whole.npz', **arrays())
    raw = bytearray((tmp_path/'whole.npz').read_bytes())
    raw[300:400] = bytes(100)   # damaged inside: the checksum of an array is wrong
    (tmp_path/'damaged.npz').write_bytes(raw)
    with pytest.raises(ValueError, match='damaged.npz'): load_arrays(data=tmp_path/'damaged.npz')
    names = 'digits, cifar10, cifar100, svhn, svhn_full, fashion_mnist'
    with pytest.raises(ValueError, match=f'{names}.*imagenet'): load_arrays('imagenet')


def test_an_npz_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    np.savez(tmp_path/'a.npz', **{**arrays(), 'x_train': np.array([Evil()], dtype=object)})
    with pytest.raises(ValueError, match='allow_pickle'): load_arrays(data=tmp_path/'a.npz')
    assert not (tmp_path/'ran').exists()


# torchvision's own classes read small files that are written here
def idx_file(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = b''.join(int(n).to_bytes(4, 'big') for n in a.shape)
    path.write_bytes(bytes([0, 0, 8, a.ndim]) + shape + a.astype(u8).tobytes())


def test_fashion_mnist(tmp_path):
    a = arrays(sz=(28, 28))
    for part, nm in (('train', 'train'), ('test', 't10k')):
        idx_file(tmp_path/f'FashionMNIST/raw/{nm}-images-idx3-ubyte', a[f'x_{part}'])
        idx_file(tmp_path/f'FashionMNIST/raw/{nm}-labels-idx1-ubyte', a[f'y_{part}'])
    x, y, xt, yt = load_arrays('fashion_mnist', data_dir=tmp_path, download=False)
    assert np.array_equal(x[..., 0], a['x_train']) and np.array_equal(yt, a['y_test']) and len(xt) == len(yt)


def svhn_file(root, split, x, y):
    "A part of SVHN as torchvision reads it; there a 0 is called 10"
    from scipy.io import savemat
    savemat(root/f'{split}_32x32.mat', dict(X=x.transpose(1, 2, 3, 0), y=np.where(y == 0, 10, y)[:, None]))


KEYS = 'x_train', 'y_train', 'x_test', 'y_test'


def test_svhn(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.SVHN, '_check_integrity', lambda self: True)
    a, extra = arrays(sz=(32, 32, 3), c=10), arrays(n=30, sz=(32, 32, 3), c=10)
    for part in ('train', 'test'): svhn_file(tmp_path, part, a[f'x_{part}'], a[f'y_{part}'])
    load = lambda name: load_arrays(name, data_dir=tmp_path, download=False)
    with pytest.raises(FileNotFoundError, match='svhn_full'): load('svhn_full')
    svhn_file(tmp_path, 'extra', extra['x_train'], extra['y_train'])
    for got, k in zip(load('svhn'), KEYS): assert np.array_equal(got, a[k])
    # as the paper has it: the train part and the extra one
    full = {**a, **{k: np.concatenate([a[k], extra[k]]) for k in KEYS[:2]}}
    for got, k in zip(load('svhn_full'), KEYS): assert np.array_equal(got, full[k])


@pytest.mark.parametrize('name,folder,files,key', [
    ('cifar10', 'cifar-10-batches-py', [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch'], 'labels'),
    ('cifar100', 'cifar-100-python', ['train', 'test'], 'fine_labels')])
def test_cifar(tmp_path, monkeypatch, name, folder, files, key):
    import pickle
    monkeypatch.setattr(torchvision.datasets.CIFAR10, '_check_integrity', lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, '_load_meta', lambda self: None)
    a = arrays(n=10*(len(files)-1), m=10, sz=(32, 32, 3), c=10)
    (tmp_path/folder).mkdir()
    for i, f in enumerate(files):
        part, s = ('test', slice(0, 10)) if f.startswith('test') else ('train', slice(10*i, 10*i+10))
        d = dict(data=a[f'x_{part}'][s].transpose(0, 3, 1, 2).reshape(10, -1))
        (tmp_path/folder/f).write_bytes(pickle.dumps({**d, key: a[f'y_{part}'][s].tolist()}))
    for got, k in zip(load_arrays(name, data_dir=tmp_path, download=False), KEYS): assert np.array_equal(got, a[k])


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'svhn', 'svhn_full', 'fashion_mnist'])
def test_no_network(tmp_path, monkeypatch, name):
    def no_net(*args, **kwargs): raise urllib.error.URLError('no route\nto host')
    monkeypatch.setattr('urllib.request.urlopen', no_net)
    with pytest.raises(FileNotFoundError) as e: load_arrays(name, data_dir=tmp_path/'new/data')
    assert name in str(e.value) and 'could not be downloaded' in str(e.value) and '\n' not in str(e.value)
    assert list(tmp_path.iterdir()) == []   # no empty folders are left behind
    (tmp_path/'old').mkdir()
    (tmp_path/'old/mine').write_text('keep me')
    with pytest.raises(FileNotFoundError): load_arrays(name, data_dir=tmp_path/'old')
    assert (tmp_path/'old/mine').exists()


# ---- loaders
def test_batches_hold_the_images(tmp_path):
    a = arrays()
    dls = dls_of(a)
    x = a['x_train'] / 255
    want = ((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).transpose(0, 3, 1, 2)
    xs, ys = map(torch.cat, zip(*dls.train.new(shuffle=False, drop_last=False)))
    assert np.allclose(xs, want, atol=1e-5) and np.array_equal(ys, a['y_train'])
    xt, yt = map(torch.cat, zip(*dls.valid))
    want = (a['x_test']/255 - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    assert np.allclose(xt, want.transpose(0, 3, 1, 2), atol=1e-5) and np.array_equal(yt, a['y_test'])
    xb, yb = dls.one_batch()
    assert type(xb) is TensorImage and type(yb) is TensorCategory and xb.dtype == torch.float32
    assert xb.is_contiguous(memory_format=torch.channels_last) and dls.c == 4


def test_shuffle_visits_each_once_and_keeps_pairs():
    a = arrays(n=50)
    a['x_train'][:, 0, 0, 0] = np.arange(50)   # each image carries its number
    a['y_train'] = np.arange(50)
    dls, c0 = dls_of(a, bs=16), a['x_train'][..., 0]
    orders = []
    for _ in range(2):
        nums, ys = [], []
        for xb, yb in dls.train:
            nums += (xb[:, 0, 0, 0]*c0.std() + c0.mean()).round().int().tolist()
            ys += yb.tolist()
        assert nums == ys and sorted(ys) == list(range(50))
        orders.append(ys)
    assert orders[0] != orders[1] != list(range(50))
    assert [len(yb) for _, yb in dls.train] == [16, 16, 16, 2] and len(dls.train) == 4


def test_same_seed_same_batches():
    a, runs = arrays(), []
    for _ in range(2):
        set_seed(3)
        runs.append(torch.cat([b[0] for b in dls_of(a, augment=True, cutout=4).train]))
    assert torch.equal(*runs)


@pytest.mark.parametrize('n,bs,sizes', [(33, 16, [16, 16]), (34, 16, [16, 16, 2]), (10, 16, [10]), (32, 16, [16, 16])])
def test_no_training_batch_of_one(n, bs, sizes): assert [len(y) for _, y in dls_of(arrays(n=n), bs=bs).train] == sizes


def test_arraydl_as_fastai_dl():
    ds = ArrayDS(torch.arange(30*4*4*3, dtype=torch.int64).reshape(30, 4, 4, 3).to(torch.uint8), torch.arange(30))
    dl = ArrayDL(ds, bs=8)
    assert len(dl) == 4 and len(dl.new(drop_last=True)) == 3 and dl.new(bs=5).bs == 5
    assert dl.new(get_idxs=lambda: [7, 7, 2]).one_batch()[1].tolist() == [7, 7, 2]
    x, y = ds[3]
    assert x.shape == (3, 4, 4) and int(y) == 3
    assert torch.equal(dl.one_batch()[0][3], x) and dl.one_batch()[0].dtype == torch.uint8
    assert torch.equal(torch.cat([b[0] for b in dl.new(num_workers=1)]), torch.cat([b[0] for b in dl]))


def test_augmentation_is_for_training_only():
    a = arrays()
    plain, aug = dls_of(a), dls_of(a, augment=True, cutout=4)
    assert torch.equal(plain.valid.one_batch()[0], aug.valid.one_batch()[0])
    assert not torch.equal(plain.train.new(shuffle=False).one_batch()[0], aug.train.new(shuffle=False).one_batch()[0])
    names = lambda dl: [type(t) for t in dl.after_batch.fs]
    assert names(aug.train) == [CropFlip, IntToFloatTensor, Normalize, Cutout]
    assert names(aug.valid) == [IntToFloatTensor, Normalize]


def test_constant_images_stay_finite():
    a = arrays()
    a['x_train'][..., 1] = 77
    assert dls_of(a).one_batch()[0].isfinite().all()


# ---- augmentation
@pytest.mark.parametrize('h,w,c,pad', [(32, 32, 3, 4), (8, 8, 1, 1), (28, 28, 1, 3), (96, 64, 3, 4), (5, 6, 3, 0)])
def test_cropflip_is_numpys_pad_and_crop(h, w, c, pad):
    x = rng.integers(0, 256, (20, c, h, w), dtype=u8)
    torch.manual_seed(5)
    got = CropFlip()(TensorImage(torch.from_numpy(x)), split_idx=0)
    torch.manual_seed(5)
    dy, dx = torch.randint(-pad, pad+1, (2, 20, 1)).squeeze(-1).tolist()
    flips = (torch.rand(20, 1) < 0.5).squeeze(1).tolist()
    for i in range(20):
        p, top, left = np.pad(x[i], ((0, 0), (pad, pad), (pad, pad)), mode='reflect'), pad+dy[i], pad+dx[i]
        p = p[:, top:top+h, left:left+w]
        assert np.array_equal(got[i], p[..., ::-1] if flips[i] else p)
    assert any(flips) and not all(flips) and type(got) is TensorImage and got.dtype == torch.uint8
    if pad: assert len(set(dy)) > 1 and len(set(dx)) > 1   # each image its own shift


def test_cropflip_options():
    x = TensorImage(torch.from_numpy(rng.integers(0, 256, (64, 3, 8, 8), dtype=u8)))
    assert torch.equal(CropFlip(pad=0, flip=False)(x, split_idx=0), x)
    assert torch.equal(CropFlip()(x, split_idx=1), x)
    same = (CropFlip(pad=0)(x, split_idx=0) == x).flatten(1).all(1)
    assert 10 < same.sum() < 54
    assert torch.equal(CropFlip(pad=0)(x, split_idx=0)[~same].sum((2, 3)), x[~same].sum((2, 3)))


@pytest.mark.parametrize('length', [2, 8, 16, 64])
def test_cutout_is_the_papers(length):
    b, h, w = 50, 32, 24
    torch.manual_seed(5)
    got = Cutout(length)(TensorImage(torch.ones(b, 3, h, w)), split_idx=0)
    torch.manual_seed(5)
    ys, xs = (torch.randint(n, (b, 1)).squeeze(1).tolist() for n in (h, w))
    for i, (y, x) in enumerate(zip(ys, xs)):   # as in the authors' code
        mask = np.ones((h, w), np.float32)
        y1, y2 = np.clip(y-length//2, 0, h), np.clip(y+length//2, 0, h)
        x1, x2 = np.clip(x-length//2, 0, w), np.clip(x+length//2, 0, w)
        mask[y1:y2, x1:x2] = 0
        assert np.array_equal(got[i], np.broadcast_to(mask, (3, h, w)))
    assert len(set(ys)) > 10
    x = TensorImage(torch.ones(4, 3, 8, 8))
    assert torch.equal(Cutout(4)(x, split_idx=1), x) and (x == 1).all()   # and the input is not written to


# ---- models
@pytest.mark.parametrize('name', ['small', 'resnet18', 'wrn16_4'])
@pytest.mark.parametrize('c,sz', [(1, 8), (3, 32), (1, 28)])
def test_models(name, c, sz):
    m = get_model(name, c, 7).to(memory_format=torch.channels_last)
    out = m(torch.randn(4, c, sz, sz).to(memory_format=torch.channels_last))
    assert out.shape == (4, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_parameter_counts():
    n = {nm: sum(p.numel() for p in get_model(nm, 3, 10).parameters()) for nm in models}
    # torchvision's, less the larger stem and the larger head; and the published ones
    tv = sum(p.numel() for p in torchvision.models.resnet18().parameters())
    assert n['resnet18'] == tv - 64*3*(49-9) - (1000-10)*513
    assert round(n['wrn16_4']/1e6, 1) == 2.7 and round(n['wrn28_10']/1e6, 1) == 36.5 and n['small'] < 0.4e6
    with pytest.raises(ValueError, match='small, resnet18, wrn16_4, wrn28_10.*vgg'): get_model('vgg', 3, 10)
    with pytest.raises(ValueError, match='18'): wide_resnet(3, 10, depth=18)
    assert [m.p for m in get_model('wrn28_10', 3, 10).modules() if isinstance(m, torch.nn.Dropout)] == [0.3]*12


def test_wide_resnet_is_preactivation():
    "A block is x + conv(relu(bn(conv(relu(bn(x)))))): with the last convolution at zero it is the identity"
    block = wide_resnet(3, 10, depth=16, k=1)[2]
    torch.nn.init.zeros_(block.convs[-1].weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x.clone()), x)
    assert block(x.clone()).min() < 0   # no ReLU after the sum


# ---- in a Learner
@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(image_dls(*load_arrays(), bs=64, device='cpu'), get_model('small', 1, 10), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 5e-3)
    return learn


def test_trains_and_predicts(learn):
    *_, xt, yt = load_arrays()
    with learn.no_bar():
        preds, targs = learn.get_preds()
        _, train_targs = learn.get_preds(ds_idx=0)
        loss, acc = learn.validate()
    assert np.array_equal(targs, yt) and np.array_equal(train_targs, load_arrays()[1])
    assert acc > 0.9 and acc == pytest.approx((preds.argmax(1).numpy() == yt).mean(), abs=1e-6)
    assert loss == pytest.approx(-np.log(preds.numpy()[np.arange(len(yt)), yt]).mean(), abs=1e-4)


def test_export_carries_no_images(learn, tmp_path):
    learn.path = tmp_path
    learn.export('e.pkl')
    other, xb = load_learner(tmp_path/'e.pkl'), learn.dls.valid.one_batch()[0]
    assert torch.equal(other.model.eval()(xb), learn.model.eval()(xb)) and len(other.dls.train_ds) == 0


def test_show_batch(learn):
    import matplotlib.pyplot as plt
    learn.dls.show_batch(max_n=4)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert all(t in '0123456789' for t in titles) and len(titles) == 4
    plt.close('all')


# ---- labels that no model could be made for, and archives that cannot be read
@pytest.mark.parametrize('key', ['y_train', 'y_test'])
@pytest.mark.parametrize('label,dtype', [(2**64-1, np.uint64), (2**63, np.uint64), (2**40, np.int64), (10**9, np.int32),
                                         (10_000, np.int64)])
def test_labels_that_ask_for_too_much_memory(tmp_path, key, label, dtype):
    a = arrays()
    a[key] = a[key].astype(dtype)
    a[key][3] = label
    np.savez(tmp_path/'a.npz', **a)
    with pytest.raises(ValueError) as e: load_arrays(data=tmp_path/'a.npz')
    for w in ('a.npz', key, 'below 10,000', str(label), '0, 1, 2'): assert w in str(e.value)


def test_as_many_classes_as_images_are_allowed():
    a = arrays(n=12_000, sz=(1, 1))
    a['y_train'] = np.arange(12_000, dtype=np.uint64)
    y = check_arrays(**a)[1]
    assert y.dtype == np.int64 and y.max() == 11_999
    few = arrays()
    few['y_train'][0] = 9_999   # with gaps, as of a part of a larger data set
    assert check_arrays(**few)[1].max() == 9_999


def npz_with_header(path, shape):
    "An .npz whose x_train says that it has another shape"
    import struct, zipfile
    np.savez(path, **arrays())
    with zipfile.ZipFile(path) as z: files = {n: z.read(n) for n in z.namelist()}
    h = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    files['x_train.npy'] = b'\x93NUMPY\1\0' + struct.pack('<H', len(h)) + h
    with zipfile.ZipFile(path, 'w') as z:
        for n, b in files.items(): z.writestr(n, b)


@pytest.mark.parametrize('n', [10**6, 10**15, 10**22])
def test_a_header_that_promises_too_much(tmp_path, n):
    npz_with_header(tmp_path/'a.npz', (n, 8, 8))
    with pytest.raises(ValueError, match='a.npz: ') as e: load_arrays(data=tmp_path/'a.npz')
    assert '\n' not in str(e.value)


def test_an_encrypted_archive(tmp_path):
    f = tmp_path/'a.npz'
    np.savez(f, **arrays())
    b = bytearray(f.read_bytes())
    for sig, at in ((b'PK\1\2', 8), (b'PK\3\4', 6)): b[b.find(sig)+at] |= 1
    f.write_bytes(b)
    with pytest.raises(ValueError, match='a.npz: .*encrypted'): load_arrays(data=f)


# ---- workers and devices: `meta` stands for a GPU, whose arrays a forked worker cannot index either
def test_arrays_stay_on_the_host_for_workers():
    kinds = lambda dls: [(dl.dataset.x.device.type, dl.dataset.y.device.type) for dl in dls.loaders]
    assert kinds(dls_of(arrays(), device='meta')) == [('meta', 'meta')]*2
    dls = dls_of(arrays(), device='meta', num_workers=2)
    assert kinds(dls) == [('cpu', 'cpu'), ('meta', 'meta')] and dls.device == torch.device('meta')
    assert dls.train.new(num_workers=0).dataset.x.is_cpu
    assert {t.device.type for t in dls.train.one_batch()} == {'meta'}   # made on the host by a worker, then copied
    xb, yb = dls_of(arrays(), num_workers=1).one_batch()
    assert xb.shape == (16, 3, 8, 8) and yb.shape == (16,)


def test_workers_for_arrays_on_a_device_are_refused():
    dls = dls_of(arrays(), device='meta')
    for make in (lambda: ArrayDL(dls.train.dataset, bs=4, num_workers=2), lambda: dls.train.new(num_workers=2)):
        with pytest.raises(ValueError, match='num_workers=2: .*arrays on meta.*num_workers=0'): make()


# ---- a folder of images
def write_images(root, per_class, sz=(9, 7), start=0, ext='png'):
    "Images whose colour tells their class, in a folder each"
    from PIL import Image
    for i, (c, n) in enumerate(per_class.items()):
        (root/c).mkdir(parents=True, exist_ok=True)
        for j in range(n): Image.fromarray(np.full((*sz, 3), 80*i+20, u8)).save(root/c/f'{start+j}.{ext}')


def colours(dls):
    "The colour before normalization of each image, and its class's name"
    got = []
    for xb, yb in (b for dl in dls.loaders for b in dl.new(shuffle=False, drop_last=False)):
        assert xb.shape[1:] == (3, 8, 8) and type(xb) is TensorImage and type(yb) is TensorCategory
        got += [(round(float(x[0, 4, 4]*0.229 + 0.485)*255), dls.vocab[y]) for x, y in zip(xb, yb)]
    return got


def test_folder_by_class(tmp_path):
    write_images(tmp_path, dict(a=10, b=20, c=20))
    (tmp_path/'notes').mkdir()   # not a class: there are no images
    (tmp_path/'notes/read.me').write_text('hello')
    dls = folder_dls(tmp_path, size=8, bs=16, num_workers=0, device='cpu')
    assert dls.c == 3 and list(dls.vocab) == ['a', 'b', 'c']
    train, valid = set(dls.train_ds.items), set(dls.valid_ds.items)
    assert (len(train), len(valid)) == (40, 10) and not train & valid and len(train | valid) == 50
    assert set(colours(dls)) == {(20, 'a'), (100, 'b'), (180, 'c')} and len(colours(dls)) == 50
    again, other = (folder_dls(tmp_path, size=8, num_workers=0, seed=s) for s in (0, 1))
    assert set(again.valid_ds.items) == valid != set(other.valid_ds.items)
    assert len(folder_dls(tmp_path, size=8, num_workers=0, valid_pct=0.5).valid_ds) == 25


def test_the_draw_does_not_depend_on_nor_move_the_global_generators(tmp_path):
    write_images(tmp_path, dict(a=5, b=5))
    set_seed(0)
    folder_dls(tmp_path, size=8, num_workers=0, seed=1)
    before = torch.rand(1), np.random.rand()
    set_seed(0)
    files = folder_dls(tmp_path, size=8, num_workers=0).valid_ds.items
    assert (torch.rand(1), np.random.rand()) == before
    assert folder_dls(tmp_path, size=8, num_workers=0).valid_ds.items == files


@pytest.mark.parametrize('valid', ['valid', 'val', 'test'])
def test_folder_with_train_and_valid(tmp_path, valid):
    write_images(tmp_path/'train', dict(a=6, b=9))
    write_images(tmp_path/valid, dict(b=4), sz=(20, 30))
    dls = folder_dls(str(tmp_path), size=8, bs=4, num_workers=0, device='cpu')
    assert (len(dls.train_ds), len(dls.valid_ds)) == (15, 4) and list(dls.vocab) == ['a', 'b']
    part_of = lambda ds: {f.parent.parent.name for f in ds.items}
    assert part_of(dls.train_ds) == {'train'} and part_of(dls.valid_ds) == {valid}
    assert [len(b[1]) for b in dls.train] == [4, 4, 4, 3]
    assert dls.valid.one_batch()[1].tolist() == [1]*4


def test_folder_loaders_drop_only_a_batch_of_one(tmp_path):
    write_images(tmp_path/'train', dict(a=5, b=4))
    write_images(tmp_path/'valid', dict(a=1))
    sizes = lambda bs: [len(b[1]) for b in folder_dls(tmp_path, size=8, bs=bs, num_workers=0).train]
    assert sizes(4) == [4, 4] and sizes(5) == [5, 4] and sizes(16) == [9]


def test_a_folder_as_arrays(tmp_path):
    "Pixels and labels are those of the files, in the order of folder_dls; a grey image has three equal channels"
    from PIL import Image
    write_images(tmp_path/'train', dict(a=6, b=9), sz=(8, 12))
    write_images(tmp_path/'valid', dict(b=4), sz=(8, 12))
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(tmp_path/'train/a/grey.png')
    x, y, xt, yt = load_arrays(data=tmp_path)
    dls = folder_dls(tmp_path, size=8, num_workers=0, device='cpu')
    assert x.shape == (16, 8, 12, 3) and y.tolist() == [0]*7 + [1]*9 and xt.shape == (4, 8, 12, 3) and set(yt) == {1}
    for image, f in zip([*x, *xt], [*dls.train_ds.items, *dls.valid_ds.items]):
        np.testing.assert_array_equal(image, np.asarray(Image.open(f).convert('RGB')))
    write_images(tmp_path/'train', dict(c=1), sz=(9, 12))
    with pytest.raises(ValueError, match='12x9 pixels.*12x8.*one size'): load_arrays(data=tmp_path)


def test_folder_augmentation(tmp_path):
    write_images(tmp_path, dict(a=5, b=5))
    dls = folder_dls(tmp_path, size=8, num_workers=0, augment=True, flip=False, cutout=3)
    tfms = {type(t): t for t in dls.train.after_batch.fs}
    assert tfms[CropFlip].flip is False and tfms[Cutout].length == 3
    plain = {type(t) for t in folder_dls(tmp_path, size=8, num_workers=0).train.after_batch.fs}
    assert not plain & {CropFlip, Cutout}


def test_a_folder_trains_exports_and_predicts(tmp_path):
    write_images(tmp_path/'d', dict(dark=12, light=12))
    dls = folder_dls(tmp_path/'d', size=8, bs=8, num_workers=0, device='cpu')
    learn = Learner(dls, get_model('small', 3, 2), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(6, 1e-2)
    assert learn.recorder.values[-1][-1] == 1.
    learn.export('e.pkl')
    assert b'.png' not in (tmp_path/'e.pkl').read_bytes()   # no list of files goes with it
    loaded = load_learner(tmp_path/'e.pkl')
    with loaded.no_bar(): assert loaded.predict(tmp_path/'d/light/0.png')[0] == 'light'


@pytest.mark.parametrize('build,words', [
    (lambda p: None, ['no such folder']),
    (lambda p: p.mkdir(), ['subfolder', 'none']),
    (lambda p: write_images(p, dict(a=5)), ['two or more', 'found: a']),
    (lambda p: write_images(p/'train', dict(a=5, b=5)), ['valid or val or test']),
    (lambda p: (write_images(p/'train', dict(a=5, b=5)), write_images(p/'valid', dict(a=1, z=1))), ['class z']),
    (lambda p: (write_images(p/'train', dict(a=5, b=5)), (p/'valid').mkdir()), ['10 images', '0 to validate on']),
])
def test_folder_faults(tmp_path, build, words):
    build(tmp_path/'imgs')
    with pytest.raises((ValueError, FileNotFoundError)) as e: folder_dls(tmp_path/'imgs')
    for w in ('imgs', *words): assert w in str(e.value)
    assert '\n' not in str(e.value)
