"Wrong calls: what is called, the error, and a part of the sentence that only this mistake gets."

import tempfile

import numpy as np
import torch
from common import digits, digits_learner, digits_model, quiet_fit
from fastai.basics import CrossEntropyLossFlat
from fastai.callback.mixup import MixUp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsb.all
from fastsb.data import get_model, image_dls, load_arrays
from fastsb.train import fastsb_train, read_lr_sched

T, V, F, R = TypeError, ValueError, FileNotFoundError, RuntimeError


class Tuples(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def of_learner():
    "What stands in front of most of the calls: a learner, a model, losses, data"
    x, y = digits(160)
    m, loss = digits_model(), nn.CrossEntropyLoss()
    dl = DataLoader(TensorDataset(x, y), 32)
    first = lambda pred, t, reduction="mean": nn.functional.cross_entropy(pred[0], t, reduction=reduction)
    own = lambda pred, t: nn.functional.cross_entropy(pred, t)
    fit = lambda learn, n=3: quiet_fit(learn, n)
    names = dict(vars(fastsb.all), x=x, y=y, m=m, loss=loss, dl=dl, own=own, fit=fit, torch=torch, nn=nn, np=np)
    new = lambda **kw: digits_learner(n=96, **kw)
    flat = CrossEntropyLossFlat
    batch = (x[:32], y[:32])
    engine = lambda **kw: fastsb.all.SelectiveBackprop(m, loss, 32, **kw)
    sampler = lambda n=96, **kw: fastsb.all.SelectiveSampler(n, **{"loss_func": loss, **kw})
    train = lambda **kw: fastsb_train(**{**dict(output_dir=tempfile.mkdtemp(), epochs=1), **kw})
    return names | dict(
        learn=new(), new=new, MixUp=MixUp, flat=flat, batch=batch, engine=engine, sampler=sampler, train=train,
        Tuples=Tuples, first=first, memory=fastsb.all.ItemMemory(96), history=fastsb.all.LossHistory(8),
        record=fastsb.all.Record(),
        buffer=fastsb.all.BatchBuffer(4), load_arrays=load_arrays, get_model=get_model, image_dls=image_dls,
        read_lr_sched=read_lr_sched,
    )  # fmt: skip


def calls(before, after, error, *args):
    "A row for each pair of an argument and what the sentence must hold"
    return [(f"{before}{arg}{after}", error, says) for arg, says in args]


CALLS = [
    *calls(
        "learn.selective_backprop(", ")", T,
        ("beta='1'", "beta='1' must be a number"),
        ("beta=True", "beta=True must be a number"),
        ("history=1.5", "history=1.5 must be an int"),
        ("start='0'", "start='0' must be a number"),
        ("end=None, start=None", "start=None must be a number"),
        ("exact=1, beta=1", "exact=1 must be True or False"),
        ("seed=.5, beta=1", "seed=0.5 must be an int or None"),
        ("selector=3", "selector=3 must be a fastsb Selector, such as TopK(.5)"),
        ("selector=TopK", "selector=TopK is a class: pass TopK()"),
        ("selector=TopK, keep=.4", "selector=TopK is a class: pass TopK()"),
        ("selector=3, keep=.4", "selector=3 must be a fastsb Selector or one of percentile,"),
        ("keep='.4'", "keep='.4' must be a number"),
        ("interrupt=2.5", "interrupt=2.5 must be an int or None"),
        ("per_item=3", "per_item=3 must be callable or None"),
        ("score=Scorer", "score=Scorer is a class: pass Scorer(...)"),
        ("score=m", "score is a Sequential: pass Proxy(it)"),
        ("stale=1.5", "stale=1.5 must be an int"),
        ("momentum='0'", "momentum='0' must be a number"),
        ("max_age=None", "max_age=None must be an int"),
        ("pool=None", "pool=None must be a number"),
        ("bs=32.", "bs=32.0 must be an int or None"),
        ("paper=1", "paper=1 must be True or False"),
        ("betta=1", "There is no argument betta=1, only beta, history"),
    ),
    *calls(
        "learn.selective_backprop(", ")", V,
        ("beta=-1", "beta=-1 must be at least 0"),
        ("beta=float('nan')", "beta=nan must be at least 0"),
        ("history=0", "history=0 must be at least 1"),
        ("start=1.", "start=1.0 is a fraction of the fit"),
        ("start=1.5", "start=1.5 must be between 0 and 1"),
        ("start=.5, end=.2", "end=0.2 must come after start=0.5"),
        ("end=-1", "end=-1 must be at least 0"),
        ("exact=False", "exact=False draws by percentiles: pass beta= too"),
        ("batching='buffer'", "batching='buffer' must be one of 'accumulate', 'prune'"),
        ("beta=1, selector=TopK(.5)", "Pass either selector=TopK(keep=0.5) or beta=1, not both"),
        ("beta=1, selector='topk'", "beta=1 chooses by loss: leave keep and selector out"),
        ("beta=1, keep=.4", "beta=1 chooses by loss: leave keep and selector out"),
        ("selector='topp'", "selector='topp' must be one of 'percentile', 'random',"),
        ("selector=TopK(.5), keep=.4", "keep=0.4: TopK(keep=0.5) says itself how many it keeps"),
        ("selector='percentile', keep=.4", "keep=0.4 is not for selector='percentile', only for random, topk,"),
        ("selector='orderedpool', keep=.9", "keep=0.9 must be at most pool=0.75"),
        ("keep=40", "keep=40 must be between 0 and 1"),
        ("seed=1, selector=TopK(.5)", "Pass either selector=TopK(keep=0.5) or beta, exact and seed"),
        ("rescale='none'", "rescale='none' must be one of"),
        ("rescale='sum', selector=InfoBatch()", "rescale='sum': InfoBatch(r=0.5) weighs what it keeps itself"),
        ("interrupt=1", "interrupt=1 must be at least 2"),
        ("score='remembered'", "score='remembered' must be one of 'auto', 'model', 'cached', 'two_stage'"),
        ("score=3", "score=3 must be 'model', a Scorer"),
        ("stale=0", "stale=0 must be at least 1"),
        ("stale=2, score='cached'", "stale=2 is for score='model'"),
        ("stale=2, score=Scorer(size=.5)", "stale=2: scores of"),
        ("momentum=1", "momentum=1 would never remember"),
        ("momentum=-.1", "momentum=-0.1 must be between 0 and 1"),
        ("max_age=0", "max_age=0 must be at least 1"),
        ("pool=0", "pool=0 must be above 0"),
        ("bs=1", "bs=1 must be at least 2"),
        ("selector=GradNorm(), score='cached'", "GradNorm(presample=3, tau=2) looks at predictions, and a"),
    ),
    *calls(
        "fit(new(", ")", V,
        ("cbs=MixUp()).infobatch()", "InfoBatch(r=0.5) weighs the loss of each example, and MixUp mixes"),
        ("cbs=MixUp()).selective_backprop(rescale='sum')", "rescale='sum' weighs the loss of each example, and MixUp"),
        (").selective_backprop(selector=ReducibleLoss(torch.rand(9)))", "irreducible holds the losses of 9 items"),
        (").selective_backprop(selector=ReducibleLoss(torch.rand(9)), score='model')", "irreducible holds the losses"),
        (").selective_backprop(selector=Uncertainty(.5, like=nn.BCEWithLogitsLoss()), score=lambda m, b: b[0][:, 0])",
         "these scores come without predictions"),
        (").selective_backprop(beta=1, score=Scorer(size=.5))", "size=0.5"),
        ("model=Tuples(64, 10), loss_func=first).selective_backprop(selector=Uncertainty(.5))", "goes by doubt"),
    ),
    *calls(
        "fit(new(loss_func=", "))", T,
        ("own).selective_backprop(beta=1", "cannot be split into one loss per example: it has neither"),
        ("own).infobatch(", "cannot be split into one loss per example: it has neither"),
        ("own).batch_loss_filter(", "cannot be split into one loss per example: it has neither"),
        ("own).selective_backprop(beta=1, per_item=own", "must return one loss per example"),
    ),
    *calls(
        "learn.batch_loss_filter(", ")", T,
        ("min_loss_perc='.9'", "min_loss_perc='.9' must be a number"),
        ("min_samples_perc='.1'", "min_samples_perc='.1' must be a number"),
        ("start=None", "start=None must be a number"),
        ("per_item=1", "per_item=1 must be callable"),
        ("beta=1", "beta"),
    ),
    *calls(
        "learn.batch_loss_filter(", ")", V,
        ("min_loss_perc=1.5", "min_loss_perc=1.5 must be between 0 and 1"),
        ("min_loss_perc=lambda pct: 2*pct", "min_loss_perc at 1 of the fit=2"),
        ("min_samples_perc=-.1", "min_samples_perc=-0.1 must be between 0 and 1"),
        ("end=1.5", "end=1.5 must be between 0 and 1"),
        ("batching='all'", "batching='all' must be one of"),
        ("rescale='inverse'", "rescale='inverse'"),
        ("bs=0", "bs=0 must be at least 2"),
    ),
    *calls("learn.infobatch(", ")", V,
           ("r=1", "r=1 must be below 1"), ("r=-.5", "r=-0.5 must be between 0 and 1"),
           ("delta=0", "delta=0 must be above 0"),
           ("delta=2", "delta=2 must be between 0 and 1")),
    *calls("learn.infobatch(", ")", T,
           ("r='half'", "r='half' must be a number"), ("delta=None", "delta=None must be a number"),
           ("seed='1'", "seed='1' must be an int or None"), ("per_item=0", "per_item=0 must be callable")),
    # selectors
    *calls(
        "", "", T,
        ("Percentile('1')", "beta='1' must be a number"),
        ("Percentile(1, exact='yes')", "exact='yes' must be True or False"),
        ("Random(None)", "keep=None must be a number"),
        ("Hybrid(1, '.5')", "mix='.5' must be a number"),
        ("Threshold(None)", "loss=None must be a number"),
        ("TopK('.5')", "keep='.5' must be a number"),
        ("TopK(.5, seed=1.)", "seed=1.0 must be an int or None"),
        ("Capped(.9)", "selector=0.9 must be a Selector without weights"),
        ("GradNorm('3')", "presample='3' must be a number"),
        ("ReducibleLoss([1., 2.], keep='1')", "keep='1' must be a number"),
        ("InfoBatch(None)", "r=None must be a number"),
        ("OrderedPool(None)", "pool=None must be a number"),
        ("DoubtShare('all')", "share='all' must be a number"),
        ("DoubtAbove('.7')", "part='.7' must be a number"),
    ),
    *calls(
        "", "", V,
        ("Percentile(-1)", "beta=-1 must be at least 0"),
        ("Random(0)", "keep=0 must be above 0"),
        ("Hybrid(1, 2)", "mix=2 must be between 0 and 1"),
        ("Threshold(float('inf'))", "loss=inf must be finite"),
        ("TopK(50)", "keep=50 must be between 0 and 1"),
        ("LowK(-.5)", "keep=-0.5 must be between 0 and 1"),
        ("LossShare(-1)", "min_loss_perc=-1 must be between 0 and 1"),
        ("Capped(TopK(.5), 0)", "max_percentile=0 must be above 0"),
        ("Capped(Uncertainty(.5))", "Uncertainty(keep=0.5) does not choose by loss"),
        ("GradNorm(1)", "presample=1 must be above 1"),
        ("GradNorm(tau=-1)", "tau=-1 must be at least 0"),
        ("ReducibleLoss([])", "irreducible must be a tensor of one finite loss for each item of the training set: it"),
        ("ReducibleLoss(torch.tensor([1., float('nan')]))", "irreducible"),
        ("Uncertainty(0)", "keep=0 must be above 0"),
        ("Uncertainty(.5, like=nn.MSELoss())", "like=MSELoss() must be a loss over classes"),
        ("DoubtShare(.9, floor=.5, ceiling=.2)", "floor=0.5 must be at most ceiling=0.2"),
        ("DoubtAbove(-.7)", "part=-0.7 must be at least 0"),
        ("DoubtAbove(floor=2)", "floor=2 must be between 0 and 1"),
        ("DoubtAbove(like='ce')", "like='ce' must be a loss over classes: one of"),
        ("InfoBatch(1.)", "r=1.0 must be below 1"),
        ("OrderedPool(.5, .75)", "keep=0.75 must be at most pool=0.5"),
    ),
    # the engine
    *calls(
        "SelectiveBackprop(", ")", T,
        ("loss_func=loss, model='m', bs=32", "model='m' must be a torch.nn.Module"),
        ("m, None, 32", "loss_func=None must be callable"),
        ("m, loss, '32'", "bs='32' must be an int"),
        ("m, loss, 32, forward=3", "forward=3 must be callable"),
        ("m, loss, 32, epochs=2.", "epochs=2.0 must be an int or None"),
        ("m, loss, 32, record={}", "record={} must be a fastsb Record"),
        ("m, loss, 32, score=Proxy", "score=Proxy is a class"),
    ),
    *calls(
        "SelectiveBackprop(", ")", V,
        ("m, loss, 0", "bs=0 must be at least 1"),
        ("m, loss, 32, beta=-2", "beta=-2 must be at least 0"),
        ("m, loss, 32, start=.1", "start=0.1, end=None: a float is a share of the fit"),
        ("m, loss, 32, epochs=0", "epochs=0 must be at least 1"),
        ("m, loss, 32, n_items=0", "n_items=0 must be at least 1"),
        ("m, loss, 32, selector=TopK(.5), beta=2", "Pass either selector=TopK(keep=0.5) or beta"),
        ("m, loss, 32, score=Doubtful(), selector=Uncertainty(.5)", "does not choose by loss"),
        ("m, loss, 32, selector=GradNorm(), score=lambda m, b: m(b[0]).sum(1)", "score=<lambda>: GradNorm("),
    ),
    ("next(SelectiveBackprop(m, own, 32).batches(dl))", T, "cannot be split"),
    ("engine(forward=lambda m, b: m(b[0])).offer(batch)", T, "must return (prediction, targets)"),
    ("engine(forward=lambda m, b: (m(b[0]), b[1])).offer(batch)", T, "with the targets in a tuple"),
    ("engine().offer({'x': x, 'y': y})", T, "A batch is a dict, not (inputs, target): pass forward="),
    ("engine().offer((x[:8], y[:9]))", V, "batch[0] has 8 rows but batch[1] has 9"),
    ("engine().offer(([], []))", V, "holds no tensor"),
    ("engine().progress", V, "pass epochs= to SelectiveBackprop"),
    ("engine().steps(dl)", V, "pass epochs= to SelectiveBackprop"),
    ("engine(epochs=2, exact=False).steps(dl)", V, "does not always keep the same number"),
    ("engine(score=Doubtful(), start=0).offer(batch)", V, "needs the losses that are remembered"),
    ("engine(score=Scorer(size=.5), start=0).offer(batch)", V, "Only images"),
    ("engine(score=lambda m, b: m(b[0]), start=0).offer(batch)", V, "must return one number a row"),
    ("engine().load_state_dict({})", V, "The saved state"),
    # sampler, memory
    *calls(
        "sampler(", ")", T,
        ("'96'", "n_items='96' must be an int"),
        ("selector='topk'", "selector='topk' must be a fastsb Selector"),
        ("loss_func=3", "loss_func=3 must be callable"),
        ("epochs=1.5", "epochs=1.5 must be an int"),
        ("drop_last=1", "drop_last=1 must be True or False"),
        ("shuffle=None", "shuffle=None must be True or False"),
        ("seed='0'", "seed='0' must be an int"),
    ),
    *calls(
        "sampler(", ")", V,
        ("0", "n_items=0 must be at least 1"),
        ("epochs=0", "epochs=0 must be at least 1"),
        ("bs=0", "bs=0 must be at least"),
        ("max_age=0", "max_age=0 must be at least 1"),
        ("momentum=2", "momentum=2 must be between 0 and 1"),
        ("rescale='max'", "rescale='max' must be one of"),
        ("selector=GradNorm()", "looks at predictions"),
        ("start=.5, end=.5", "end=0.5 must come after start=0.5"),
    ),
    ("iter(sampler()).__next__()", V, "a fraction of the fit needs its length; pass epochs="),
    ("sampler(epochs=3, selector=TopK(.5), loss_func=None).observe([0, 1])", V, "observe needs losses="),
    ("sampler(epochs=3).observe([0, 1], losses=[1., 2.])", V, "pass pred= to observe"),
    ("sampler(epochs=3, selector=TopK(.5)).observe([0, 200], losses=[1., 2.])", V, "items holds 200"),
    ("sampler(epochs=3, selector=TopK(.5)).observe([0, 1], losses=[1.])", V, "There are 2 items, but 1 losses"),
    ("sampler().progress", V, "pass epochs= to the sampler"),
    ("sampler().set_epoch(-1)", V, "epoch=-1 must be at least 0"),
    ("sampler().load_state_dict({})", V, "The saved state lacks"),
    ("WithItems(3)", T, "dataset=3 must have indices"),
    ("WithItems([{'items': 1}])[0]", V, "Samples have an entry 'items' already: pass another key="),
    ("ItemMemory(0)", V, "n_items=0 must be at least 1"),
    ("ItemMemory(9, momentum=1.)", V, "momentum=1.0 would never remember"),
    ("memory.update([1.5], torch.ones(1), epoch=0)", T, "items must be indices"),
    ("memory.update([96], torch.ones(1), epoch=0)", V, "items holds 96, but the 96 items are numbered from 0 to 95"),
    ("memory.update([1], torch.ones(2), epoch=0)", V, "There are 1 items, but 2 losses"),
    ("memory.update([1], torch.ones(1), epoch=-1)", V, "epoch=-1 must be at least 0"),
    ("memory.losses(max_age=3)", V, "max_age=3 needs the current epoch: pass epoch="),
    ("memory.load_state_dict({})", V, "The saved memory lacks"),
    ("choose([1], TopK(.5), 0)", T, "memory=[1] must be an ItemMemory"),
    ("choose(memory, TopK(.5), 0, chunk=0)", V, "chunk=0 must be at least 1"),
    # buffer, history, record
    ("BatchBuffer(0)", V, "bs=0 must be at least 1"),
    ("buffer.load_state_dict({})", V, "The saved state is not of a BatchBuffer"),
    ("LossHistory(0)", V, "history=0 must be at least 1"),
    ("LossHistory('big')", T, "history='big' must be an int"),
    ("history.load_state_dict(LossHistory(9).state_dict())", V, "The saved history holds 9 losses, this one 8: pass"),
    ("Record(0)", V, "limit=0 must be at least"),
    ("record.load_state_dict([])", V, "The saved record must be a dict, not a list"),
    # losses
    ("per_item_loss(own, m(x), y)", T, "cannot be split into one loss per example"),
    ("per_item_loss(loss, m(x), y, per_item=own)", T, "must return one loss per example"),
    ("per_item_loss(loss, torch.tensor(1.), torch.tensor(1))", T, "hold no tensor with a batch dimension"),
    ("weighted_loss(loss, m(x), y, w=[1.])", V, "w must be one weight for each of 160 examples"),
    # scorers
    ("Scorer(precision='fp8')", V, "precision='fp8' must be one of"),
    ("Scorer(size=0)", V, "size=0 must be above 0"),
    ("Scorer(size='half')", T, "size='half' must be a number"),
    ("Scorer(channels_last=1)", T, "channels_last=1 must be True or False"),
    ("Scorer(compile='fast')", T, "compile='fast' must be True, False or a dict"),
    ("Proxy(3)", T, "model=3 must be a torch.nn.Module"),
    ("Proxy(m, every=0)", V, "every=0 must be at least 1"),
    ("Proxy(m, opt_func=3)", T, "opt_func=3 must be callable"),
    ("Doubtful(2)", V, "share=2 must be between 0 and 1"),
    # plots, what is saved
    ("learn.selective_backprop().sb.plot_selected()", V, "There is nothing to plot yet: fit first"),
    ("learn.selective_backprop().sb.plot_time()", V, "There is nothing to plot yet"),
    ("compare({})", V, "fits={} must hold a fit"),
    ("compare({'plain': learn}, metric='accuracy')", V, "learn.selective_backprop(beta=0)"),
    ("compare({'a': fit(new().selective_backprop())}, metric='f1')", V, "metric='f1' must be a column of the log"),
    ("compare({'a': fit(new().selective_backprop())}, against=('hours',))", V, "against='hours' must be one of"),
    ("plot_probability([GradNorm()])", V, "does not go by the loss alone"),
    ("learn.selective_backprop().sb.state_dict()", V, "There is nothing to save yet: fit first"),
    ("learn.selective_backprop().sb.load('never')", F, "There is no saved state"),
    ("learn.selective_backprop().sb.load_state_dict({})", V, "The saved state lacks"),
    ("irreducible_losses(new(loss_func=own))", T, "cannot be split"),
    # how long, advice, small images
    ("learn.fit_for()", V, "Pass either epochs (of plain training) or seconds, not epochs=None and seconds=None"),
    ("learn.fit_for(3, seconds=5)", V, "Pass either epochs (of plain training) or seconds, not epochs=3 and"),
    ("learn.fit_for(0)", V, "epochs=0 must be above 0, epochs of plain training whose time is meant"),
    ("learn.fit_for('3')", T, "epochs='3' must be a number"),
    ("learn.fit_for(seconds=-1)", V, "seconds=-1 must be above 0"),
    ("learn.sb_advice(0)", V, "epochs=0 must be above 0"),
    ("learn.sb_advice(batches=1)", V, "batches=1 must be at least 2"),
    ("learn.sb_advice(batches=2.)", T, "batches=2.0 must be an int or None"),
    ("learn.smaller_first(2)", V, "size=2 must be between 0 and 1, a part of the side of the images"),
    ("learn.smaller_first('half')", T, "size='half' must be a number"),
    ("learn.smaller_first(until=0)", V, "until=0 must be above 0, a share of the fit"),
    ("learn.smaller_first((.5, .7))", V, "size=(0.5, 0.7) and until=0.6 must have one number for each stage"),
    ("learn.smaller_first(how='pad')", V, "how='pad' must be one of 'crop', 'resize'"),
    ("fit(learn.smaller_first())", V, "SmallerFirst is for images, float tensors of shape (B, C, H, W)"),
    # items
    ("learn.selective_backprop().sb.items()", V, "Nothing is known of the items yet: fit first"),
    ("learn.selective_backprop().sb.likely_wrong()", V, "Nothing is known of the items yet: fit first"),
    ("fit(new().selective_backprop(score='model')).sb.items()", V, "Nothing was remembered of the items in this fit"),
    ("fit(new().selective_backprop()).sb.show_items(most=3, least=3)", V, "Pass one of most, least and items, not"),
    ("fit(new().selective_backprop()).sb.show_items(most=0)", V, "most=0 must be at least 1: how many to show"),
    ("fit(new().selective_backprop()).sb.show_items(items=[96])", V, "items=[96] must be indices of the training set"),
    ("fit(new().selective_backprop()).sb.likely_wrong(0)", V, "n=0 must be at least 1: how many to list"),
    ("fit(new().selective_backprop()).sb.plot_losses(by='entropy')", V, "by='entropy' must be one of 'loss', 'doubt'"),
    # data, the command's function
    ("load_arrays('mnist1d')", V, "svhn_full, fashion_mnist, not 'mnist1d'"),
    ("load_arrays(data='nowhere.npz')", F, "nowhere.npz: no such file"),
    ("get_model('resnet1', 3, 10)", V, "not 'resnet1'"),
    *calls(
        "train(", ")", V,
        ("strategy='magic'", "strategy='magic' must be one of"),
        ("model='resnet1'", "model='resnet1' must be one of"),
        ("dataset='mnist1d'", "dataset='mnist1d' must be one of"),
        ("epochs=0", "epochs=0 must be at least 1"),
        ("batch_size=1", "batch_size=1 must be at least 2"),
        ("learning_rate=0", "learning_rate=0 must be above 0"),
        ("keep=2", "keep=2 must be between 0 and 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("seed=2**32", "seed=4294967296 must be at most"),
        ("strategy='infobatch', rescale='sum'", "rescale='sum' is not used by strategy infobatch"),
        ("strategy='nofilter', beta=1", "beta=1 is not used by strategy nofilter"),
        ("part=-1", "part=-1 must be at least 0"),
        ("budget=0", "budget=0 must be above 0, epochs of plain training whose time is meant"),
        ("epochs=2, budget=2", "epochs=2 and budget=2 both say how long: give one"),
        ("strategy='topk', part=.7", "part=0.7 is not used by selector topk"),
        ("strategy='topk', beta=1", "beta=1 is not used by selector topk"),
        ("strategy='topk', selector='lowk'", "strategy='topk' is a selector already"),
        ("staleness=2", "staleness=2 is not used by score auto"),
        ("length=4", "length=4 is not used without cutout"),
        ("size=32", "size=32 is used with a folder of images only"),
    ),
    ("train(lr_sched='nowhere.json')", F, "nowhere.json"),
    ("train(data='nowhere.npz')", F, "nowhere.npz: no such file"),
    ("train(epochs='2')", T, "epochs='2' must be an int"),
    ("train(bf16=1)", T, "bf16=1 must be True or False"),
]  # fmt: skip


def outcome(call):
    "The error that a call ends with, and its sentence"
    try:
        eval(call, of_learner())
    except Exception as e:
        text = str(e.args[0]) if e.args else ""
        return type(e), text.split(":\n\t", 1)[-1] if text.startswith("Exception occured in") else text
    return None, "nothing"
