"fastsb.train: the command line, in this process, and in one of its own where its streams matter"
import contextlib, inspect, io, json, os, re, runpy, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed

import fastsb.train
from fastsb.data import Cutout, CropFlip, get_model, image_dls, load_arrays
from fastsb.score import Scorer
from fastsb.select import Hybrid, LowK, Percentile, Random, Threshold, TopK, Uncertainty
from fastsb.train import fastsb_train, read_lr_sched

N, M = 1437, 360   # digits to train and to test on
COLUMNS = ('epoch candidates fp bp selected candidate_loss trained_loss scoring_s training_s left top_share loads '
           'score_age loading_s held oldest selecting_s forward_s backward_s other_s '
           'test_loss test_acc seconds steady_s').split()
TIMES = [c for c in COLUMNS if c.endswith('_s')] + ['seconds']


def train(out, **kwargs):
    "Train from Python, the paper's way unless told otherwise; returns the learner, what was printed, and the log"
    kwargs = dict(strategy='sb', report='paper') | kwargs
    with contextlib.redirect_stdout(io.StringIO()) as s: learn = fastsb_train(output_dir=out, **kwargs)
    return learn, s.getvalue(), pd.read_csv(Path(out)/'log.csv')


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    "Run the command as its console script does; returns exit code, stdout and stderr"
    script = tmp_path/'fastsb_train'
    script.write_text('import sys\nfrom fastsb.train import main\nsys.exit(main())\n')
    monkeypatch.chdir(tmp_path)
    def run(*args):
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        capsys.readouterr()
        try: runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e: return (e.code or 0, *capsys.readouterr())
    return run


@pytest.fixture(scope='module')
def sb_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('sb')
    return out, *train(out, epochs=4, batch_size=64)


# ---- what a run leaves
def blocks(text):
    "The numbers of the reference implementation's blocks"
    pat = (r'Epoch (\d+) / (\d+)\nFPs: (\d+) / (\d+)\nBPs: (\d+) / (\d+)\nTest loss: (\d+\.\d{4})\n'
           r'Test acc: (\d+\.\d\d)\nTime elapsed: (\d+\.\d) s\n')
    return [list(map(float, b)) for b in re.findall(pat, text)]


def test_blocks_and_log_agree(sb_run):
    out, _, text, log = sb_run
    assert list(log.columns) == COLUMNS and log.epoch.tolist() == [1, 2, 3, 4]
    assert len(blocks(text)) == 4
    for (e, es, fp, n1, bp, n2, loss, acc, s), row in zip(blocks(text), log.itertuples()):
        assert (e, es, fp, n1, bp, n2) == (row.epoch, 4, row.fp, N, row.bp, N) and row.candidates == N
        assert loss == pytest.approx(row.test_loss, abs=1e-4) and acc == pytest.approx(row.test_acc, abs=0.01)
        assert s == pytest.approx(row.seconds, abs=0.06)
    assert text.endswith(f"Wrote {out/'log.csv'} and {out/'selected.png'}\n")
    assert sorted(os.listdir(out)) == ['log.csv', 'selected.png']
    assert (out/'selected.png').read_bytes()[:4] == b'\x89PNG'


def test_the_log_adds_up(sb_run):
    _, learn, _, log = sb_run
    assert log.fp.tolist() == [0, N, N, N] and log.bp[0] == N
    assert log.scoring_s[0] == 0 and (log.scoring_s[1:] > 0).all()
    assert np.allclose(log.selected, log.bp/log.candidates) and (log.bp[1:] % 64 == 0).all() and (log.left < 64).all()
    assert ((log.selected[1:] > 0.3) & (log.selected[1:] < 0.7)).all()   # beta 1 keeps a half
    assert (log.trained_loss[1:] < 10).all() and log.seconds.is_monotonic_increasing
    assert (log.scoring_s + log.training_s <= log.seconds.diff().fillna(log.seconds[0])).all()


def test_test_figures_are_of_the_test_set(sb_run):
    "Loss and accuracy of the last epoch, by NumPy, on images normalized here"
    _, learn, _, log = sb_run
    x, _, xt, yt = load_arrays()
    images = torch.tensor((xt.transpose(0, 3, 1, 2)/255 - x.mean()/255)/(x.std()/255)).float()
    with torch.no_grad(): logits = learn.model.eval()(images).numpy()
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert log.test_loss.iloc[-1] == pytest.approx(-logp[np.arange(M), yt].mean(), abs=1e-3)
    assert log.test_acc.iloc[-1] == pytest.approx(100*(logits.argmax(1) == yt).mean(), abs=1e-3)


def plain_fit(epochs, bs, lr, seed=0, before=None):
    "The same training by fastai alone, after `before(learn)`"
    set_seed(seed)
    dls = image_dls(*load_arrays(), bs=bs, flip=False)
    opt = lambda ps, lr: OptimWrapper(ps, opt=torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    model = get_model('small', 1, 10).to(memory_format=torch.channels_last)
    learn = Learner(dls, model, opt_func=opt, wd=5e-4, metrics=accuracy)
    if before: before(learn)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, moms=(0.9, 0.9, 0.9))
    return learn


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_nofilter_is_fastai_alone(tmp_path):
    learn, text, log = train(tmp_path/'a', strategy='nofilter', epochs=2, learning_rate=0.05)
    assert not hasattr(learn, 'sb') and list(log.columns) == COLUMNS
    assert log.fp.tolist() == [0, 0] and log.bp.tolist() == log.candidates.tolist() == log.loads.tolist() == [N, N]
    assert (log.selected == 1).all() and (log.left == 0).all()
    assert (log.loading_s > 0).all() and (log.training_s > 0).all()
    assert blocks(text)[1][2:6] == [0, N, N, N]
    ref = plain_fit(2, 128, 0.05)
    assert same_weights(learn, ref) and learn.recorder.lrs == ref.recorder.lrs
    assert log.test_loss[1] == pytest.approx(ref.recorder.values[1][1])
    assert log.test_acc[1] == pytest.approx(100*ref.recorder.values[1][2])
    # keeping everything is the same training again; selecting, or another seed, is not
    assert same_weights(train(tmp_path/'b', beta=0., epochs=2, learning_rate=0.05)[0], ref)
    assert not same_weights(train(tmp_path/'c', epochs=2, learning_rate=0.05)[0], ref)
    assert not same_weights(train(tmp_path/'d', strategy='nofilter', epochs=2, learning_rate=0.05, seed=1)[0], ref)


def test_same_seed_same_run(sb_run, tmp_path):
    _, learn, _, log = sb_run
    again, _, log2 = train(tmp_path, epochs=4, batch_size=64)
    assert same_weights(learn, again)
    assert log.drop(columns=TIMES).equals(log2.drop(columns=TIMES))


def test_beta_and_start(tmp_path):
    _, _, log = train(tmp_path, epochs=6, beta=3., start=2, batch_size=32)
    assert log.fp.tolist() == [0, 0] + [N]*4
    assert 0.15 < log.selected[2:].mean() < 0.36   # 1/(3+1)


def test_trained_loss_of_nofilter(tmp_path, monkeypatch):
    "It is the mean over examples, not over batches (the last one is smaller)"
    seen = []
    orig = fastsb.train.EpochReport.after_batch
    def spy(self):
        if self.training: seen.append((float(self.loss), len(self.yb[0])))
        orig(self)
    monkeypatch.setattr(fastsb.train.EpochReport, 'after_batch', spy)
    _, _, log = train(tmp_path, strategy='nofilter', epochs=1, batch_size=500)
    losses, ns = map(np.array, zip(*seen))
    assert ns.tolist() == [500, 500, 437]
    assert log.trained_loss[0] == pytest.approx((losses*ns).sum()/N, rel=1e-5)
    assert log.candidate_loss[0] == pytest.approx(log.trained_loss[0], rel=1e-6)


# ---- options
def test_augmentation_options(tmp_path):
    def tfms(**kwargs):
        learn = train(tmp_path, epochs=1, batch_size=512, strategy='nofilter', **kwargs)[0]
        return {type(t): t for t in learn.dls.train.after_batch.fs}
    t = tfms()
    assert CropFlip not in t and Cutout not in t and Normalize in t
    t = tfms(data_augmentation=True, cutout=True)
    assert t[CropFlip].flip is False and t[Cutout].length == 4   # digits are not flipped; half of 8 pixels
    assert tfms(cutout=True, length=3)[Cutout].length == 3
    np.savez(tmp_path/'a.npz', **dict(zip(('x_train', 'y_train', 'x_test', 'y_test'), load_arrays())))
    assert tfms(data=tmp_path/'a.npz', data_augmentation=True)[CropFlip].flip is True


def test_an_npz_trains_like_the_same_data_by_name(tmp_path):
    np.savez(tmp_path/'a.npz', **dict(zip(('x_train', 'y_train', 'x_test', 'y_test'), load_arrays())))
    a, b = train(tmp_path/'a', epochs=1)[0], train(tmp_path/'b', epochs=1, data=str(tmp_path/'a.npz'))[0]
    assert same_weights(a, b)


def test_bf16(tmp_path):
    seen = []
    orig = torch.nn.Conv2d.forward
    def spy(self, x):
        out = orig(self, x)
        seen.append((out.dtype, self.training))
        return out
    torch.nn.Conv2d.forward = spy
    try: learn, _, log = train(tmp_path, epochs=2, bf16=True)
    finally: torch.nn.Conv2d.forward = orig
    assert {d for d, _ in seen} == {torch.bfloat16}   # training, scoring and testing
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32} and np.isfinite(log.test_loss).all()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in learn.model.parameters() if p.dim() == 4)


# ---- learning rates
def expected_rates(sched, first, sizes):
    "The rate of each step, if `sizes` examples are counted for it and the ones before it"
    seen, out = 0, []
    for n in sizes:
        out.append(([lr for k, lr in sorted(sched.items()) if k <= seen] or [first])[-1])
        seen += n
    return out


def test_lr_sched_counts_backprops(tmp_path):
    sched = {2000: 0.02, 100: 0.2, 1437: 0.05, 2001: 0.01}
    (tmp_path/'s.json').write_text(json.dumps(sched))
    learn, _, log = train(tmp_path/'a', epochs=3, batch_size=64, learning_rate=0.3, lr_sched=str(tmp_path/'s.json'))
    # the first epoch trains on everything, then come full batches
    sizes = [64]*22 + [29] + [64]*((log.bp[1]+log.bp[2])//64)
    assert len(sizes) < 66 and sum(sizes) == log.bp.sum()
    assert learn.recorder.lrs == expected_rates(sched, 0.3, sizes)
    assert {0.3, 0.2, 0.05, 0.01} <= set(learn.recorder.lrs)


def test_lr_sched_counts_candidates_with_forwardlr(tmp_path, monkeypatch):
    sched, steps = {500: 0.2, 1437: 0.05, 2877: 0.02}, []
    orig = fastsb.train.EpochReport.after_batch
    def spy(self):   # of each batch that is trained on: the rate then, and which of the batches of candidates it is
        if self.training: steps.append((self.opt.hypers[-1]['lr'], 23*self.epoch + self.iter))
        orig(self)
    monkeypatch.setattr(fastsb.train.EpochReport, 'after_batch', spy)
    (tmp_path/'s.json').write_text(json.dumps(sched))
    options = dict(lr_sched=str(tmp_path/'s.json'), forwardlr=True)
    learn, _, log = train(tmp_path/'a', epochs=3, batch_size=64, learning_rate=0.3, **options)
    want = expected_rates(sched, 0.3, ([64]*22 + [29])*3)
    assert [lr for lr, _ in steps] == [want[i] for _, i in steps]
    assert learn.recorder.lrs == [want[i] for _, i in steps]
    assert len(learn.recorder.lrs) < len(want)


def test_without_lr_sched_it_is_one_cycle(sb_run):
    _, learn, *_ = sb_run
    assert not any(isinstance(cb, ParamScheduler) for cb in learn.cbs)   # of the fit, and gone with it
    lrs = learn.recorder.hps['lr']
    assert max(lrs) == pytest.approx(0.1, rel=0.02) and lrs[-1] < 0.01*max(lrs)
    assert set(learn.recorder.hps['mom']) == {0.9}


@pytest.mark.parametrize('text,words', [
    ('{"0": 0.1', ['not valid JSON']), ('[0.1]', ['object']), ('{}', ['object']),
    ('{"0.5": 0.1}', ["'0.5'"]), ('{"-1": 0.1}', ["'-1'"]),
    ('{"0": "fast"}', ["'fast'"]), ('{"0": -0.1}', ['-0.1']), ('{"0": 0}', ['positive']),
    ('{"0": NaN}', ['nan']), ('{"0": true}', ['True']), ('{"0": null}', ['None'])])
def test_lr_sched_faults(tmp_path, text, words):
    (tmp_path/'s.json').write_text(text)
    with pytest.raises(ValueError) as e: read_lr_sched(tmp_path/'s.json')
    for w in ('lr_sched', 's.json', *words): assert w in str(e.value)
    with pytest.raises(FileNotFoundError, match='none.json'): read_lr_sched(tmp_path/'none.json')


# ---- the command
def test_help(cli):
    code, out, err = cli('--help')
    assert code == 0 and err == ''
    # each with a text beside it
    options = re.findall(r'^  --(\w+)(?: [A-Z]+)?(?:, --(\w+)(?: [A-Z]+)?)? +\w', out, re.M)
    assert [o for o, _ in options] == list(inspect.signature(fastsb_train).parameters)
    assert {o: a for o, a in options if a} == dict(beta='prob_pow', selector='calculator', score='fp_selector')


def test_command(cli, tmp_path):
    code, out, err = cli('--strategy', 'nofilter', '--epochs', 1, '--batch_size=512', '--output_dir', 'o/p')
    assert (code, err) == (0, '') and blocks(out) == [] and sorted(os.listdir('o/p')) == ['log.csv', 'selected.png']


BAD = [
    ('--strategy all', ['strategy', "'default', 'sb'", "'topk'", "'all'"]),
    ('--dataset mnist', ['dataset', 'fashion_mnist', "'mnist'"]),
    ('--model vgg', ['model', "'small', 'resnet18', 'wrn16_4', 'wrn28_10'", "'vgg'"]),
    ('--report all', ['report', "'line', 'paper'"]),
    ('--epochs 0', ['epochs', 'at least 1', '0']), ('--epochs -3', ['epochs', '-3']),
    ('--epochs many', ['epochs', "'many'"]), ('--epochs 1.5', ['epochs', "'1.5'"]),
    ('--epochs', ['epochs', 'argument']),
    ('--batch_size 1', ['batch_size', 'at least 2']), ('--batch_size x', ['batch_size', "'x'"]),
    ('--learning_rate -0.1', ['learning_rate', '-0.1']), ('--learning_rate 0', ['learning_rate', 'above 0']),
    ('--learning_rate nan', ['learning_rate', 'nan']), ('--learning_rate inf', ['learning_rate', 'inf']),
    ('--learning_rate fast', ['learning_rate', "'fast'"]),
    ('--prob_pow -1', ['beta', '-1']), ('--prob_pow x', ['prob_pow', "'x'"]), ('--beta -1', ['beta', '-1']),
    ('--start -1', ['start', '-1']), ('--start soon', ['start', "'soon'"]), ('--start 1.5', ['start', '1.5']),
    ('--start 3 --end 2', ['end=2', 'start=3']), ('--strategy blf --end 2.5', ['end', '2.5']),
    ('--strategy infobatch --end 2.5', ['end', '2.5']),
    ('--seed -1', ['seed', '-1']), ('--seed 4294967296', ['seed', '4294967295']),
    ('--cutout --length 0', ['length', 'at least 1']), ('--cutout --length 9', ['length', '8', '9']),
    ('--data none.npz', ['none.npz']), ('--data keys.npz', ['keys.npz', 'x_test, y_test']),
    ('--data dtype.npz', ['dtype.npz', 'x_train', 'uint8', 'float64']),
    ('--data shape.npz', ['shape.npz', 'x_train', '(5, 64)']),
    ('--data bad.json', ['bad.json']), ('--data folder', ['folder', 'two or more subfolders']),
    ('--lr_sched none.json', ['none.json']), ('--lr_sched bad.json', ['bad.json', 'JSON']),
    ('--lr_sched list.json', ['list.json']),
    ('--output_dir file', ['output_dir', 'file']), ('--output_dir file/sub', ['output_dir', 'file/sub']),
    ('--output_dir /proc/nowhere/sub', ['output_dir', '/proc/nowhere']),
    ('--output_dir ' + 'a'*300, ['output_dir']), ('--data ' + 'a'*300, ['aaa']), ('stray', ['stray']),
    ('--staleness 0', ['staleness', 'at least 1']), ('--calculator rank', ['selector', "'percentile'", "'rank'"]),
    ('--fp_selector never', ['score', "'auto', 'model'", "'never'"]), ('--rescale max', ['rescale', "'max'"]),
    ('--keep 0', ['keep', 'above 0']), ('--keep 2', ['keep', 'between 0 and 1']),
    ('--threshold -1', ['threshold', '-1']),
    ('--strategy blf --min_loss_perc 1.5', ['min_loss_perc', '1.5']),
    ('--selector absolute --score cached', ['Absolute', "score='model'"]),
    # what nothing would make use of
    ('--strategy infobatch --rescale sum', ["rescale='sum' is not used by strategy infobatch"]),
    ('--strategy infobatch --start 2', ['start=2 is not used by strategy infobatch']),
    ('--strategy nofilter --beta 2', ['beta=2.0 is not used by strategy nofilter']),
    ('--strategy nofilter --start 0', ['start=0 is not used by strategy nofilter']),
    ('--strategy blf --score cached', ["score='cached' is not used by strategy blf"]),
    ('--min_loss_perc .5', ['min_loss_perc=0.5 is not used by strategy default']),
    ('--strategy sb --keep .4', ['keep=0.4 is not used by selector percentile']),
    ('--beta 1 --keep .4', ['keep=0.4 is not used by selector percentile']),
    ('--selector topk --beta 2', ['beta=2.0 is not used by selector topk']),
    ('--strategy topk --prob_pow 2', ['beta=2.0 is not used by selector topk']),
    ('--strategy topk --selector lowk', ["strategy='topk' is a selector already"]),
    ('--selector random --keep .4 --beta 2', ['keep=0.4 and beta=2.0']),
    ('--threshold 2', ['threshold=2.0 is not used by selector doubtabove']),
    ('--staleness 2', ['staleness=2 is not used by score auto']),
    ('--strategy sb --score model --staleness 2', ['staleness=2 is not used by score model']),
    ('--score_size .5', ['score_size=0.5 is not used by score auto']),
    ('--strategy sb --score two_stage --score_precision bf16', ["'bf16' is not used by score two_stage"]),
    ('--length 3', ['length=3 is not used without cutout']),
    ('--forwardlr', ['forwardlr is not used without lr_sched']),
    ('--size 32', ['size=32', 'folder']), ('--data none.npz --dataset cifar10', ["'cifar10'", "'none.npz'"]),
]


@pytest.mark.parametrize('args,words', BAD, ids=[a[:40] for a, _ in BAD])
def test_faults_of_the_command(cli, tmp_path, args, words):
    y = np.zeros(5, int)
    np.savez('keys.npz', x_train=np.zeros((5, 8, 8), np.uint8), y_train=y)
    np.savez('dtype.npz', x_train=np.zeros((5, 8, 8)), y_train=y, x_test=np.zeros((5, 8, 8)), y_test=y)
    np.savez('shape.npz', x_train=np.zeros((5, 64), np.uint8), y_train=y, x_test=np.zeros((5, 64), np.uint8), y_test=y)
    Path('bad.json').write_text('{"0": 0.1')
    Path('list.json').write_text('[1]')
    Path('file').write_text('mine')
    Path('folder').mkdir()
    before = sorted(os.listdir())
    code, out, err = cli(*([] if '--output_dir' in args else ['--output_dir', 'new/out']), *args.split())
    assert code == 2 and out == ''
    assert err.startswith('fastsb_train: ') and err.count('\n') == 1 and err.endswith('\n')
    for w in words: assert w in err
    assert sorted(os.listdir()) == before and Path('file').read_text() == 'mine'


def test_faults_from_python_are_exceptions(tmp_path):
    wrong = (dict(strategy='all'), dict(epochs='2'), dict(epochs=2.), dict(learning_rate=True), dict(beta='1'),
             dict(cutout=True, length=-1), dict(cutout=1), dict(strategy='infobatch', rescale='sum'))
    for kwargs in wrong:
        with pytest.raises((ValueError, TypeError), match=list(kwargs)[-1]):
            fastsb_train(output_dir=tmp_path/'o', **kwargs)
    with pytest.raises(FileNotFoundError): fastsb_train(output_dir=tmp_path/'o', data=tmp_path/'none.npz')
    assert not (tmp_path/'o').exists()


def test_ctrl_c(cli, monkeypatch):
    orig = fastsb.train.EpochReport.before_train
    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
        orig(self)
    monkeypatch.setattr(fastsb.train.EpochReport, 'before_train', stop)
    code, out, err = cli('--epochs', 3, '--output_dir', 'o')
    assert code == 130 and err.strip() == 'fastsb_train: interrupted.'
    assert pd.read_csv('o/log.csv').epoch.tolist() == [1]   # what was done is kept
    with pytest.raises(KeyboardInterrupt): train('p', epochs=3)


def process(folder, *args, **kwargs):
    "Arguments of `subprocess` for the command in a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(Path(fastsb.__file__).parent.parent), 'OMP_NUM_THREADS': '1'}
    return [sys.executable, '-m', 'fastsb.train', *args], dict(cwd=folder, env=env, **kwargs)


def test_in_a_process_of_its_own(tmp_path):
    "No warning of an import, no progress bar in a pipe, and the exit codes of a shell"
    def run(*args):
        args, kwargs = process(tmp_path, *args, capture_output=True, text=True)
        return subprocess.run(args, **kwargs)
    r = run('--epochs', '2', '--batch_size', '256')
    assert (r.returncode, r.stderr) == (0, '') and '\r' not in r.stdout and '█' not in r.stdout
    assert r.stdout.startswith('epoch 1/2: trained on 1,437 of 1,437; test loss ')
    assert sorted(os.listdir(tmp_path/'fastsb_out')) == ['log.csv', 'selected.png']
    r = run('--epochs', 'x', '--output_dir', 'other')
    assert (r.returncode, r.stdout) == (2, '') and r.stderr.count('\n') == 1 and not (tmp_path/'other').exists()


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='no pseudo-terminals here')
def test_a_progress_bar_on_a_terminal(tmp_path):
    main_end, end = os.openpty()
    options = '--epochs', '2', '--batch_size', '256'
    args, kwargs = process(tmp_path, *options, stdin=end, stdout=end, stderr=subprocess.PIPE)
    with subprocess.Popen(args, **kwargs) as p:
        os.close(end)
        out = b''
        try:
            while new := os.read(main_end, 4096): out += new
        except OSError: pass   # the other end was closed
        assert p.wait() == 0
    os.close(main_end)
    text = out.decode()
    assert '█' in text and 'Epoch 2/2 :' in text
    lines = re.findall(r'epoch \d/2: trained on [^\r]*', text)
    assert len(lines) == 2 and 'train_loss' not in text   # fastai's table would say all that a second time


def test_other_commands_keep_fastcores_parser():
    "Importing the module changes nothing of fastcore"
    code = ('import fastcore.script as s; before = dict(vars(s)); import fastsb.train; '
            'changed = [k for k in before if vars(s)[k] is not before[k]]; assert not changed, changed')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=Path(fastsb.__file__).parent.parent)


# ---- the default, and what is printed
def test_the_default_is_the_one_liner(tmp_path):
    _, text, log = train(tmp_path/'a', strategy='default', epochs=4, learning_rate=0.05, report='line')
    ref = plain_fit(4, 128, 0.05, before=lambda learn: learn.selective_backprop())
    learn = train(tmp_path/'b', strategy='default', epochs=4, learning_rate=0.05)[0]
    assert same_weights(learn, ref) and not same_weights(learn, plain_fit(4, 128, 0.05))
    assert (log.fp == 0).all() and log.loads.tolist() == log.bp.tolist() and log.bp[0] == N and log.bp[1] < N
    assert inspect.signature(fastsb_train).parameters['strategy'].default == 'default'


@pytest.mark.parametrize('strategy', ['nofilter', 'default', 'sb'])
def test_a_budget_is_the_time_of_so_many_plain_epochs(tmp_path, strategy):
    learn, text, log = train(tmp_path, strategy=strategy, budget=2.5, batch_size=64, learning_rate=0.05, report='line')
    assert log.epoch.tolist() == list(range(1, learn.n_epoch+1)) and f'epoch {learn.n_epoch}/{learn.n_epoch}' in text
    assert learn.recorder.lrs[-1] < 0.05/20
    first = log.iloc[0]
    plain = (first.loading_s + first.forward_s + first.backward_s)/N # of an item
    its_own = first.loading_s/N + first.training_s/N
    choosing = log.selecting_s
    spent = log.bp.sum()*its_own + choosing[:-1].sum()
    if strategy == 'nofilter': assert 2.5*N <= log.bp.sum() < 2.5*N + 64
    if strategy == 'default': assert 2.5*N*plain <= spent < 2.5*N*plain + 64*its_own + choosing.max()
    for wrong, says in ((dict(epochs=3), 'both say how long'), (dict(lr_sched='s.json'), 'leave lr_sched out')):
        with pytest.raises(ValueError, match=says): fastsb_train(budget=2., output_dir=tmp_path/'never', **wrong)


@pytest.mark.parametrize('options,kwargs', [
    (dict(keep=.3), dict(selector=Uncertainty(.3))),
    (dict(beta=2.), dict(beta=2.)),
    (dict(beta=2., score='model', score_size=.5), dict(beta=2., score=Scorer(size=.5))),
    (dict(selector='topk', keep=.3, start=2, end=.7), dict(selector=TopK(.3), start=2, end=.7)),
    (dict(selector='percentile', beta=3., score='stale', staleness=2),
     dict(selector=Percentile(3.), score='model', stale=2)),
    (dict(selector='random', beta=3., score='cached', rescale='sum'),
     dict(selector=Random(.25), score='cached', rescale='sum')),
    (dict(strategy='sb'), dict(paper=True)),
    (dict(strategy='sb', beta=2.), dict(paper=True, beta=2.)),
    (dict(strategy='sb', selector='hybrid', beta=2., end=.5), dict(paper=True, selector=Hybrid(2.), end=.5)),
    (dict(strategy='sb', selector='threshold', threshold=.5), dict(paper=True, selector=Threshold(.5))),
    (dict(strategy='lowk', keep=.7), dict(paper=True, selector=LowK(.7))),
])
def test_options_are_those_of_the_one_liner(tmp_path, monkeypatch, options, kwargs):
    seen = []
    orig = Learner.selective_backprop
    monkeypatch.setattr(Learner, 'selective_backprop', lambda self, **kw: seen.append(kw) or orig(self, **kw))
    train(tmp_path, **dict(strategy='default', epochs=1, batch_size=512) | options)
    assert {k: str(v) for k, v in seen[0].items()} == {k: str(v) for k, v in kwargs.items()}


def test_the_references_options_are_aliases(cli, monkeypatch):
    seen = []
    monkeypatch.setattr(fastsb.train, '_run', lambda o, *job: None)
    monkeypatch.setattr(fastsb.train, '_prepare', lambda o: seen.append(vars(o)) or ())
    for names in ('prob_pow', 'calculator', 'fp_selector'), ('beta', 'selector', 'score'):
        options = zip(names, (2, 'relative', 'stale'))
        assert cli('--strategy', 'sb', *(o for name, v in options for o in (f'--{name}', v)))[0] == 0
    assert seen[0] == seen[1] and (seen[0]['beta'], seen[0]['selector'], seen[0]['score']) == (2., 'relative', 'stale')


def test_epochs_and_fractions_are_told_apart(cli, monkeypatch):
    seen = []
    monkeypatch.setattr(fastsb.train, '_prepare', lambda o: seen.append((o.start, o.end)) or ())
    monkeypatch.setattr(fastsb.train, '_run', lambda o, *job: None)
    cli('--start', 1, '--end', '0.9')
    cli('--start', '1.0', '--end', 5)
    cli()
    assert list(map(repr, seen)) == ['(1, 0.9)', '(1.0, 5)', '(None, None)']


def test_a_line_an_epoch_and_one_at_the_end(tmp_path):
    _, text, log = train(tmp_path, epochs=10, batch_size=512, report='line')
    lines = text.splitlines()
    for row, line in zip(log.itertuples(), lines):
        scored = f', scored {row.fp:,}' if row.fp else ''
        assert line == (f'epoch {row.epoch:2}/10: trained on {row.bp:,} of {N:,}{scored}; '
                        f'test loss {row.test_loss:.4f}, accuracy {row.test_acc:.2f} %; {row.seconds:.1f} s')
    assert lines[-2] == fastsb.train.summed_up(log)
    counts = f'Loaded {10*N:,} and trained on {log.bp.sum():,} of {10*N:,} items'
    assert lines[-2].startswith(f'{counts} in {log.seconds.iloc[-1]:.1f} s; ')


def of_epochs(loads, fp, seconds, steady_s):
    "A log of epochs of 100 items, of which all that is loaded is trained on"
    cols = dict(candidates=100, loads=loads, bp=loads, fp=fp, seconds=np.cumsum(seconds), steady_s=steady_s)
    return pd.DataFrame(cols)


def test_what_plain_training_would_have_taken():
    log = of_epochs([100, 40, 40, 40, 100], 0, [9., 2., 2., 2., 6.], [5., 2., 2., 2., 6.])
    # the first epoch's slow start is there once, as in any fit
    assert fastsb.train.plain_seconds(log) == 9 + 3*5.5 + 6
    assert fastsb.train.summed_up(log) == ('Loaded 320 and trained on 320 of 500 items in 21.0 s; '
                                           'plain training would have taken about 31.5 s.')
    scored = of_epochs(100, [100, 100, 100], [3., 3., 3.], 3.)
    assert fastsb.train.plain_seconds(scored) is None and 'no epoch was whole' in fastsb.train.summed_up(scored)
    plain = of_epochs(100, [0, 0], [3., 3.], 3.)
    assert fastsb.train.summed_up(plain) == 'Loaded and trained on 200 items in 6.0 s.'


def test_the_pace_of_an_epoch_is_that_of_its_median_batch():
    report = fastsb.train.EpochReport('unused')
    # the first batch took long; 1 s before, 3 s after
    report.epoch_begun, report.ticks = 10., [11., 19., 20., 21., 22.]
    assert report._steady(25.) == 4 + 4*1.


def test_what_the_callbacks_have_to_say_is_heard(tmp_path):
    _, text, _ = train(tmp_path, strategy='default', epochs=2, batch_size=512)
    assert 'fastsb: nothing was left out.' in text


def test_the_learner_is_as_fastai_left_it(tmp_path):
    learn = train(tmp_path, epochs=1, batch_size=512)[0]
    assert learn.logger is print and type(learn.progress) is ProgressCallback
    learn.fit(1)


# ---- images of one's own
def test_a_folder_of_images(tmp_path, cli):
    from PIL import Image
    x, y, *_ = load_arrays()
    for i, (im, c) in enumerate(zip(x[:200, ..., 0], y)):
        (tmp_path/'mine'/f'digit {c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(tmp_path/'mine'/f'digit {c}'/f'{i}.png')
    code, out, err = cli('--data', tmp_path/'mine', '--size', 16, '--epochs', 2, '--batch_size', 32)
    assert (code, err) == (0, '') and out.startswith('epoch 1/2: trained on 160 of 160; ')
    options = dict(data=tmp_path/'mine', epochs=2, batch_size=32, size=16)
    learn, _, log = train(tmp_path/'p', cutout=True, data_augmentation=True, **options)
    assert learn.dls.one_batch()[0].shape == (32, 3, 16, 16)
    assert list(learn.dls.vocab) == [f'digit {c}' for c in range(10)]
    assert {type(t): t for t in learn.dls.train.after_batch.fs}[Cutout].length == 8
    assert log.candidates.tolist() == [160, 160] and log.fp.tolist() == [0, 160]
    assert train(tmp_path/'q', data=tmp_path/'mine', epochs=1)[0].dls.one_batch()[0].shape[2:] == (64, 64)


KEPT = dict(blf=(0.2, 0.99), random=(0.3, 0.7), topk=(0.5, 0.5), lowk=(0.5, 0.5), threshold=(0.01, 0.99),
            gradnorm=(0.3, 1), infobatch=(0.5, 0.9), orderedpool=(0.5, 0.5), uncertainty=(0.5, 0.5))


@pytest.mark.parametrize('strategy', KEPT)
def test_every_strategy(tmp_path, strategy):
    learn, text, log = train(tmp_path, strategy=strategy, epochs=4, learning_rate=0.05)
    lo, hi = KEPT[strategy]
    assert log.selected[0] == 1 and log.columns.tolist() == COLUMNS
    assert log.selected[1:3].between(lo-0.08, hi+0.08).all() and len(blocks(text)) == 4


@pytest.mark.parametrize('selector', ['random', 'hybrid', 'absolute'])
def test_selectors(tmp_path, selector):
    learn, _, log = train(tmp_path, selector=selector, epochs=3, learning_rate=0.05)
    assert type(learn.sb.selector).__name__.lower() == selector
    assert log.fp.tolist() == [0, N, N] and log.selected[2] < 0.95


def test_scores(tmp_path):
    for score, fp in (dict(score='stale', staleness=3), [0, N, 0, 0, N]), (dict(score='cached'), [0]*5):
        _, _, log = train(tmp_path, **score, epochs=5, learning_rate=0.05)
        assert log.fp.tolist() == fp and (log.candidates == N).all() and log.selected[2:4].max() < 0.8
    _, _, log = train(tmp_path, score='two_stage', epochs=3, learning_rate=0.05)
    assert 0.7*N < log.fp[2] < 0.9*N
