"fastsb.train: the command line, in this process by a script like pip's, and in its own process where its streams matter"
import contextlib, io, json, os, re, runpy, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.schedule import ParamScheduler
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed

import fastsb.train
from fastsb.data import Cutout, CropFlip, get_model, image_dls, load_arrays
from fastsb.train import fastsb_train, read_lr_sched

N, M = 1437, 360   # digits to train and to test on
COLUMNS = 'epoch candidates fp bp selected candidate_loss trained_loss scoring_s training_s left test_loss test_acc seconds'.split()


def train(out, **kwargs):
    "Train from Python; returns the learner, what was printed, and the log"
    with contextlib.redirect_stdout(io.StringIO()) as s: learn = fastsb_train(output_dir=out, **kwargs)
    return learn, s.getvalue(), pd.read_csv(Path(out)/'log.csv')


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    "Run the command as its console script does; returns exit code, stdout and stderr"
    script = tmp_path/'fastsb_train'
    script.write_text('import sys\nfrom fastsb.train import fastsb_train\nsys.exit(fastsb_train())\n')
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
    pat = r'Epoch (\d+) / (\d+)\nFPs: (\d+) / (\d+)\nBPs: (\d+) / (\d+)\nTest loss: (\d+\.\d{4})\nTest acc: (\d+\.\d\d)\nTime elapsed: (\d+\.\d) s\n'
    return [list(map(float, b)) for b in re.findall(pat, text)]


def test_blocks_and_log_agree(sb_run):
    out, _, text, log = sb_run
    assert list(log.columns) == COLUMNS and log.epoch.tolist() == [1, 2, 3, 4]
    assert len(blocks(text)) == 4
    for (e, es, fp, n1, bp, n2, loss, acc, s), row in zip(blocks(text), log.itertuples()):
        assert (e, es, fp, n1, bp, n2) == (row.epoch, 4, row.fp, N, row.bp, N) and row.candidates == N
        assert loss == pytest.approx(row.test_loss, abs=1e-4) and acc == pytest.approx(row.test_acc, abs=0.01) and s == pytest.approx(row.seconds, abs=0.06)
    assert text.endswith(f"Wrote {out/'log.csv'} and {out/'selected.png'}\n")
    assert sorted(os.listdir(out)) == ['log.csv', 'selected.png'] and (out/'selected.png').read_bytes()[:4] == b'\x89PNG'


def test_the_log_adds_up(sb_run):
    _, learn, _, log = sb_run
    assert log.fp.tolist() == [0, N, N, N] and log.bp[0] == N and log.scoring_s[0] == 0 and (log.scoring_s[1:] > 0).all()
    assert np.allclose(log.selected, log.bp/log.candidates) and (log.bp[1:] % 64 == 0).all() and (log.left < 64).all()
    assert ((log.selected[1:] > 0.3) & (log.selected[1:] < 0.7)).all()   # beta 1 keeps a half
    assert (log.trained_loss[1:] < 10).all() and log.seconds.is_monotonic_increasing
    assert (log.scoring_s + log.training_s <= log.seconds.diff().fillna(log.seconds[0])).all()


def test_test_figures_are_of_the_test_set(sb_run):
    "Loss and accuracy of the last epoch, by NumPy, on images normalized here"
    _, learn, _, log = sb_run
    x, _, xt, yt = load_arrays()
    with torch.no_grad(): logits = learn.model.eval()(torch.tensor((xt.transpose(0, 3, 1, 2)/255 - x.mean()/255)/(x.std()/255)).float()).numpy()
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert log.test_loss.iloc[-1] == pytest.approx(-logp[np.arange(M), yt].mean(), abs=1e-3)
    assert log.test_acc.iloc[-1] == pytest.approx(100*(logits.argmax(1) == yt).mean(), abs=1e-3)


def plain_fit(epochs, bs, lr, seed=0):
    "The same training by fastai alone"
    set_seed(seed)
    dls = image_dls(*load_arrays(), bs=bs, flip=False)
    opt = lambda ps, lr: OptimWrapper(ps, opt=torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    learn = Learner(dls, get_model('small', 1, 10).to(memory_format=torch.channels_last), opt_func=opt, wd=5e-4, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, moms=(0.9, 0.9, 0.9))
    return learn


def same_weights(a, b): return all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_nofilter_is_fastai_alone(tmp_path):
    learn, text, log = train(tmp_path/'a', strategy='nofilter', epochs=2, learning_rate=0.05)
    assert not hasattr(learn, 'sb') and list(log.columns) == COLUMNS
    assert log.fp.tolist() == [0, 0] and log.bp.tolist() == log.candidates.tolist() == [N, N] and (log.selected == 1).all() and (log.left == 0).all()
    assert blocks(text)[1][2:6] == [0, N, N, N]
    ref = plain_fit(2, 128, 0.05)
    assert same_weights(learn, ref) and learn.recorder.lrs == ref.recorder.lrs
    assert log.test_loss[1] == pytest.approx(ref.recorder.values[1][1]) and log.test_acc[1] == pytest.approx(100*ref.recorder.values[1][2])
    # keeping everything is the same training again; selecting, or another seed, is not
    assert same_weights(train(tmp_path/'b', prob_pow=0., epochs=2, learning_rate=0.05)[0], ref)
    assert not same_weights(train(tmp_path/'c', epochs=2, learning_rate=0.05)[0], ref)
    assert not same_weights(train(tmp_path/'d', strategy='nofilter', epochs=2, learning_rate=0.05, seed=1)[0], ref)


def test_same_seed_same_run(sb_run, tmp_path):
    _, learn, _, log = sb_run
    again, _, log2 = train(tmp_path, epochs=4, batch_size=64)
    assert same_weights(learn, again)
    assert log.drop(columns=['scoring_s', 'training_s', 'seconds']).equals(log2.drop(columns=['scoring_s', 'training_s', 'seconds']))


def test_prob_pow_and_start(tmp_path):
    _, _, log = train(tmp_path, epochs=6, prob_pow=3., start=2, batch_size=32)
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
    assert log.trained_loss[0] == pytest.approx((losses*ns).sum()/N, rel=1e-5) and log.candidate_loss[0] == log.trained_loss[0]


# ---- options
def test_augmentation_options(tmp_path):
    tfms = lambda **kw: {type(t): t for t in train(tmp_path, epochs=1, batch_size=512, strategy='nofilter', **kw)[0].dls.train.after_batch.fs}
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
    sizes = [64]*22 + [29] + [64]*((log.bp[1]+log.bp[2])//64)   # the first epoch trains on everything, then come full batches
    assert len(sizes) < 66 and sum(sizes) == log.bp.sum()
    assert learn.recorder.lrs == expected_rates(sched, 0.3, sizes)
    assert {0.3, 0.2, 0.05, 0.01} <= set(learn.recorder.lrs)


def test_lr_sched_counts_candidates_with_forwardlr(tmp_path, monkeypatch):
    sched, steps = {500: 0.2, 1437: 0.05, 2877: 0.02}, []
    orig = fastsb.train.EpochReport.after_batch
    def spy(self):   # of each batch of candidates: the rate then, and whether it was trained on
        if self.training: steps.append((self.opt.hypers[-1]['lr'], len(self.yb) > 0))
        orig(self)
    monkeypatch.setattr(fastsb.train.EpochReport, 'after_batch', spy)
    (tmp_path/'s.json').write_text(json.dumps(sched))
    learn, _, log = train(tmp_path/'a', epochs=3, batch_size=64, learning_rate=0.3, lr_sched=str(tmp_path/'s.json'), forwardlr=True)
    want = expected_rates(sched, 0.3, ([64]*22 + [29])*3)
    assert [lr for lr, _ in steps] == want
    assert learn.recorder.lrs == [lr for lr, t in zip(want, (t for _, t in steps)) if t] and len(learn.recorder.lrs) < len(want)


def test_without_lr_sched_it_is_one_cycle(sb_run):
    _, learn, *_ = sb_run
    assert not any(isinstance(cb, ParamScheduler) for cb in learn.cbs)   # of the fit, and gone with it
    lrs = learn.recorder.hps['lr']
    assert max(lrs) == pytest.approx(0.1, rel=0.02) and lrs[-1] < 0.01*max(lrs) and set(learn.recorder.hps['mom']) == {0.9}


@pytest.mark.parametrize('text,words', [
    ('{"0": 0.1', ['not valid JSON']), ('[0.1]', ['object']), ('{}', ['object']), ('{"0.5": 0.1}', ["'0.5'"]), ('{"-1": 0.1}', ["'-1'"]),
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
    named = ('strategy dataset data data_dir model batch_size epochs learning_rate calculator prob_pow keep threshold min_loss_perc rescale fp_selector '
             'staleness score_size score_precision start data_augmentation cutout length seed output_dir bf16 lr_sched forwardlr')
    options = re.findall(r'^  --(\w+)(?: \(\w+\))? +\w', out, re.M)   # each with a text beside it
    assert options == named.split()


def test_command(cli, tmp_path):
    code, out, err = cli('--strategy', 'nofilter', '--epochs', 1, '--batch_size=512', '--output_dir', 'o/p')
    assert (code, err) == (0, '') and len(blocks(out)) == 1 and sorted(os.listdir('o/p')) == ['log.csv', 'selected.png']


BAD = [
    ('--strategy all', ['strategy', 'nofilter, sb', "'all'"]), ('--dataset mnist', ['dataset', 'fashion_mnist', "'mnist'"]),
    ('--model vgg', ['model', 'small, resnet18, wrn16_4, wrn28_10', "'vgg'"]),
    ('--epochs 0', ['epochs', 'at least 1', '0']), ('--epochs -3', ['epochs', '-3']), ('--epochs many', ['epochs', "'many'"]),
    ('--epochs 1.5', ['epochs', "'1.5'"]),
    ('--epochs', ['epochs', 'argument']), ('--batch_size 1', ['batch_size', 'at least 2']), ('--batch_size x', ['batch_size', "'x'"]),
    ('--learning_rate -0.1', ['learning_rate', '-0.1']), ('--learning_rate 0', ['learning_rate', 'above 0']), ('--learning_rate nan', ['learning_rate', 'nan']),
    ('--learning_rate inf', ['learning_rate', 'inf']), ('--learning_rate fast', ['learning_rate', "'fast'"]),
    ('--prob_pow -1', ['prob_pow', '-1']), ('--prob_pow x', ['prob_pow', "'x'"]), ('--start -1', ['start', '-1']),
    ('--seed -1', ['seed', '-1']), ('--seed 4294967296', ['seed', '4294967295']), ('--cutout --length 0', ['length', 'at least 1']),
    ('--cutout --length 9', ['length', '8', '9']),
    ('--data none.npz', ['none.npz']), ('--data keys.npz', ['keys.npz', 'x_test, y_test']), ('--data dtype.npz', ['dtype.npz', 'x_train', 'uint8', 'float64']),
    ('--data shape.npz', ['shape.npz', 'x_train', '(5, 64)']), ('--data bad.json', ['bad.json']),
    ('--lr_sched none.json', ['none.json']), ('--lr_sched bad.json', ['bad.json', 'JSON']), ('--lr_sched list.json', ['list.json']),
    ('--output_dir file', ['output_dir', 'file']), ('--output_dir file/sub', ['output_dir', 'file/sub']),
    ('--output_dir /proc/nowhere/sub', ['output_dir', '/proc/nowhere']),
    ('--output_dir ' + 'a'*300, ['output_dir']), ('--data ' + 'a'*300, ['aaa']),
    ('--staleness 0', ['staleness', 'at least 1']), ('--calculator rank', ['calculator', 'relative, random', "'rank'"]), ('stray', ['stray']),
    ('--fp_selector never', ['fp_selector', 'alwayson, stale']), ('--rescale max', ['rescale', "'max'"]), ('--keep 0', ['keep', 'above 0']),
    ('--keep 2', ['keep', 'at most 1']), ('--min_loss_perc 1.5', ['min_loss_perc', '1.5']), ('--threshold -1', ['threshold', '-1']),
    ('--calculator absolute --fp_selector cached', ['Absolute', "score='model'"]),
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
    before = sorted(os.listdir())
    code, out, err = cli(*([] if '--output_dir' in args else ['--output_dir', 'new/out']), *args.split())
    assert code == 2 and out == ''
    assert err.startswith('fastsb_train: ') and err.count('\n') == 1 and err.endswith('\n')
    for w in words: assert w in err
    assert sorted(os.listdir()) == before and Path('file').read_text() == 'mine'


def test_faults_from_python_are_exceptions(tmp_path):
    for kwargs in dict(strategy='all'), dict(epochs='2'), dict(epochs=2.), dict(learning_rate=True), dict(prob_pow=None), dict(cutout=True, length=-1):
        with pytest.raises(ValueError, match=list(kwargs)[-1]): fastsb_train(output_dir=tmp_path/'o', **kwargs)
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
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(io.StringIO()): fastsb_train(epochs=3, output_dir='p')


def test_in_a_process_of_its_own(tmp_path):
    "No warning of an import, no progress bar in a pipe, and the exit codes of a shell"
    env = {**os.environ, 'PYTHONPATH': str(Path(fastsb.__file__).parent.parent), 'OMP_NUM_THREADS': '1'}
    run = lambda *args: subprocess.run([sys.executable, '-m', 'fastsb.train', *args], cwd=tmp_path, env=env, capture_output=True, text=True)
    r = run('--epochs', '2', '--batch_size', '256')
    assert (r.returncode, r.stderr) == (0, '') and len(blocks(r.stdout)) == 2 and '\r' not in r.stdout and '█' not in r.stdout
    assert r.stdout.startswith('Epoch 1 / 2\nFPs: 0') and sorted(os.listdir(tmp_path/'fastsb_out')) == ['log.csv', 'selected.png']
    r = run('--epochs', 'x', '--output_dir', 'other')
    assert (r.returncode, r.stdout) == (2, '') and r.stderr.count('\n') == 1 and not (tmp_path/'other').exists()


def test_other_commands_keep_fastcores_parser():
    from fastcore.script import anno_parser
    def other(some_option: int = 1, # An option
              ): "Another command"
    p = anno_parser(other)
    assert type(p) is not fastsb.train.Parser and '--some-option' in p.format_help()


KEPT = dict(blf=(0.2, 0.99), random=(0.3, 0.7), topk=(0.5, 0.5), lowk=(0.5, 0.5), threshold=(0.01, 0.99),
            gradnorm=(0.3, 1), infobatch=(0.5, 0.9), orderedpool=(0.5, 0.5), uncertainty=(0.5, 0.5))


@pytest.mark.parametrize('strategy', KEPT)
def test_every_strategy(tmp_path, strategy):
    learn, text, log = train(tmp_path, strategy=strategy, epochs=4, learning_rate=0.05)
    lo, hi = KEPT[strategy]
    assert log.selected[0] == 1 and log.columns.tolist() == COLUMNS
    assert log.selected[1:3].between(lo-0.08, hi+0.08).all() and len(blocks(text)) == 4


@pytest.mark.parametrize('calculator', ['random', 'hybrid', 'absolute'])
def test_calculators(tmp_path, calculator):
    learn, _, log = train(tmp_path, calculator=calculator, epochs=3, learning_rate=0.05)
    assert type(learn.sb.selector).__name__.lower() == calculator and log.fp.tolist() == [0, N, N] and log.selected[2] < 0.95


def test_fp_selectors(tmp_path):
    for name, fp in dict(stale=[0, N, 0, 0, N], cached=[0]*5).items():
        _, _, log = train(tmp_path, fp_selector=name, staleness=3, epochs=5, learning_rate=0.05)
        assert log.fp.tolist() == fp and (log.candidates == N).all() and log.selected[2:4].max() < 0.8
    _, _, log = train(tmp_path, fp_selector='two_stage', epochs=3, learning_rate=0.05)
    assert 0.7*N < log.fp[2] < 0.9*N
