"""One update made of many, some of which may be anything: rules that withstand lying devices.

Each rule is a pure function of a matrix, one row a device's update, to one vector:
``(n, d)``, floats or integers, to float64 ``(d,)``. They must see every update, so they work
where the hub does (``plain``) and nowhere else, and what they return is no sum: one device
may move it by more than its own share, so noise that is calibrated for a mean protects nothing
here (:class:`atoll.federation.plan.Aggregation` refuses it).

What a rule withstands is its *breakdown point*: the number f of updates that may be anything,
whoever sends them and whatever they know, while the result stays as close to the honest ones
as these are to each other. No rule tells a liar who stays within the honest spread from an
honest device ("A Little Is Enough", Baruch et al., NeurIPS 2019), and all of them take devices
with unusual data for liars, the more so the fewer rows they keep. :mod:`atoll.simulations.attacks`
measures both.

Work goes block by block over the parameters, so that beside the updates themselves some
:data:`BLOCK_VALUES` numbers are held at a time, and distances between devices.

All raise :class:`BadUpdate` for a matrix of another shape or with NaN or Inf in it, and
:class:`BadParameters` for fewer rows than :func:`atoll.federation.rule.needed`.
"""

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atoll.federation.rule import Rule, needed
from atoll.privacy.errors import BadParameters, BadUpdate

Floats = npt.NDArray[np.float64]
Updates = npt.NDArray[Any]
"""``(n, d)`` of any real dtype: a row for each device."""

BLOCK_VALUES: Final = 1 << 20
"""Values worked on at once: 8 MiB as float64."""


def combine(updates: Updates, rule: Rule, byzantine: int = 0, trim: float | None = None) -> Floats:
    """Return what ``rule`` makes of the updates.

    ``byzantine`` is how many of them may be anything; ``trim`` the share that a trimmed mean cuts
    off at either end, as many as may be anything when none is given.
    """
    match rule:
        case "mean":
            return mean(updates)
        case "median":
            return median(updates)
        case "trimmed-mean":
            return trimmed_mean(updates, cut_of(len(updates), byzantine, trim))
        case "krum":
            return krum(updates, byzantine)
        case "multi-krum":
            return multi_krum(updates, byzantine)
        case "bulyan":
            return bulyan(updates, byzantine)
        case "norm-bound":
            return norm_bound(updates)


def mean(updates: Updates) -> Floats:
    """Return the mean: the yardstick, which a single liar moves anywhere."""
    rows = _checked(updates)
    return _weighed(updates, np.full(rows, 1 / rows))


def median(updates: Updates) -> Floats:
    """Return the median of each coordinate (Yin et al., ICML 2018, definition 1).

    With fewer liars than half of the rows each coordinate stays between two honest values.
    """
    return _cut_mean(updates, (_checked(updates) - 1) // 2)


def trimmed_mean(updates: Updates, cut: int) -> Floats:
    """Return each coordinate's mean without its ``cut`` lowest and ``cut`` highest values.

    Yin et al., ICML 2018, definition 2, with β = ``cut``/n. With at most ``cut`` liars each
    coordinate stays between the lowest and the highest honest value. Needs n > 2·``cut``.
    """
    _need(updates, "trimmed-mean", cut)
    return _cut_mean(updates, cut)


def krum(updates: Updates, byzantine: int) -> Floats:
    """Return the update that lies closest to its n - f - 2 nearest others.

    Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries" (NeurIPS
    2017): the row of the least sum of squared distances, the first of those that are equal.
    Needs n > 2f + 2. The result is one of the updates: a liar's only if its nearest honest row
    is no further from it than √((n - f - 2)/(n - 2f - 1)) times what honest ones are apart.
    """
    _need(updates, "krum", byzantine)
    scores = _scores(_distances(updates), byzantine)
    return np.asarray(updates[int(scores.argmin())], dtype=np.float64)


def multi_krum(updates: Updates, byzantine: int) -> Floats:
    """Return the mean of the n - f - 2 updates of the best scores in :func:`krum`.

    So many keep Krum's guarantee (Damaskinos et al., "AggregaThor", MLSys 2019), and each of
    them is as close to an honest one as Krum's. Needs n > 2f + 2.
    """
    n = _need(updates, "multi-krum", byzantine)
    scores = _scores(_distances(updates), byzantine)
    best = np.argsort(scores, kind="stable")[: n - byzantine - 2]
    return _weighed(updates, _share_of(best, n))


def bulyan(updates: Updates, byzantine: int) -> Floats:
    """Return, per coordinate, the mean of the values next to the median of rows that Krum picks.

    El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in
    Byzantium" (ICML 2018): Krum picks θ = n - 2f rows, one after the other, each from those that
    are left; then each coordinate is the mean of its θ - 2f values nearest to its median. So a
    liar close by in norm cannot be far off in one coordinate. Needs n > 4f + 2. Each coordinate
    stays within the honest values' range, widened by its own width on either side.
    """
    n = _need(updates, "bulyan", byzantine)
    distances = _distances(updates)
    left, picked = list(range(n)), list[int]()
    while len(picked) < n - 2 * byzantine:
        scores = _scores(distances[np.ix_(left, left)], byzantine)
        picked.append(left.pop(int(scores.argmin())))
    keep = len(picked) - 2 * byzantine
    result = np.empty(updates.shape[1])
    for where in _blocks(updates):
        ordered = _ordered(updates[sorted(picked), where])
        middle = _middle(ordered, (len(picked) - 1) // 2)
        nearest = np.argsort(np.abs(ordered - middle[:, None]), axis=1, kind="stable")
        result[where] = np.take_along_axis(ordered, nearest[:, :keep], axis=1).mean(axis=1)
    return result


def norm_bound(updates: Updates, bound: float | None = None) -> Floats:
    """Return the mean of the updates, each clipped to an L2 norm of ``bound``.

    Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?" (2019). The
    median of the norms when no bound is given: with fewer liars than half of the rows it is
    no longer than an honest update. A liar then moves the mean by bound/n at most, and in any
    direction: this limits what f of them do to f·bound/n, and does not undo it.
    """
    n = _checked(updates)
    norms = _norms(updates)
    limit = float(np.median(norms)) if bound is None else bound
    if bound is not None and not (math.isfinite(bound) and bound > 0):
        raise BadParameters(f"bound {bound} must be positive and finite")
    return _weighed(updates, _shrinking(norms, limit) / n)


def fltrust(updates: Updates, trusted: npt.ArrayLike) -> Floats:
    """Return the mean of the updates, weighed by how far each points where a trusted one does.

    Cao, Fang, Liu and Gong, "FLTrust" (NDSS 2021): weights are max(cos, 0) against ``trusted``
    ``(d,)``, and every update is brought to its norm; zeros when none points its way. It
    withstands any number of liars, as far as the trusted update is right.

    That one comes from clean data at the server in the paper. A hub of this project has no data,
    and a device that gave it would alone decide what the run learns: so no plan asks for this
    rule; it is here for whoever has such a device.

    Raises :class:`BadParameters` for a trusted update of another length, or of norm zero.
    """
    _checked(updates)
    root = np.asarray(trusted, dtype=np.float64)
    length = float(_norms(root[None, :])[0]) if root.ndim == 1 and root.size else 0.0
    if root.shape != updates.shape[1:] or not 0 < length < math.inf:
        raise BadParameters("a trusted update has the others' length and points somewhere")
    norms = _norms(updates)
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    along = np.zeros(len(norms))
    for where in _blocks(updates):
        turned = _floats(updates[:, where]) * inverse[:, None]
        along += _product("ij,j->i", turned, root[where] / length)
    trust = np.maximum(along, 0.0)
    total = float(trust.sum())
    if not total:
        return np.zeros(root.size)
    return _weighed(updates, trust / total * inverse * length)


def cut_of(rows: int, byzantine: int, trim: float | None) -> int:
    """Return how many values a trimmed mean cuts off at either end: ⌊trim·rows⌋, or f."""
    # The nearest float to 0.29, times 100, is a little less than 29.
    return byzantine if trim is None else math.floor(trim * rows + 1e-9)


def _checked(updates: Updates) -> int:
    """Return the number of rows of what can be worked with."""
    if updates.ndim != 2 or 0 in updates.shape:
        raise BadUpdate(f"updates are a matrix, a row each; this has shape {updates.shape}")
    for where in _blocks(updates):
        if not np.isfinite(updates[:, where]).all():
            raise BadUpdate("an update holds NaN or Inf; leave that device out")
    return len(updates)


def _need(updates: Updates, rule: Rule, byzantine: int) -> int:
    rows = _checked(updates)
    if byzantine < 0 or rows < needed(rule, byzantine):
        raise BadParameters(
            f"{rule} against {byzantine} lying devices needs {needed(rule, byzantine)} updates "
            f"or more; there are {rows}"
        )
    return rows


def _blocks(updates: Updates) -> Iterator[slice]:
    """Go through the columns, :data:`BLOCK_VALUES` values or one column at a time."""
    rows, columns = updates.shape
    step = max(BLOCK_VALUES // rows, 1)
    for start in range(0, columns, step):
        yield slice(start, start + step)


def _floats(block: Updates) -> Floats:
    floats: Floats = block.astype(np.float64, copy=False)
    return floats


def _ordered(block: Updates) -> Floats:
    """Return a block ``(n, c)`` as ``(c, n)``, each coordinate's values in order."""
    turned = np.array(block.T, dtype=np.float64, order="C")
    turned.sort(axis=1)
    return turned


def _middle(ordered: Floats, cut: int) -> Floats:
    """Return the means without ``cut`` values at either end."""
    middle = ordered[:, cut : ordered.shape[1] - cut]
    # Divided first: two halves of huge values do not leave a float's range.
    means: Floats = (middle / middle.shape[1]).sum(axis=1)
    return means


def _cut_mean(updates: Updates, cut: int) -> Floats:
    result = np.empty(updates.shape[1])
    for where in _blocks(updates):
        result[where] = _middle(_ordered(updates[:, where]), cut)
    return result


def _weighed(updates: Updates, weights: Floats) -> Floats:
    """Return Σ wᵢ·uᵢ; a row of weight zero does not enter it, whatever it holds."""
    used = np.flatnonzero(weights)
    result = np.zeros(updates.shape[1])
    for where in _blocks(updates):
        result[where] = _product("i,ij->j", weights[used], _floats(updates[used, where]))
    return result


def _product(indices: str, left: Floats, right: Floats) -> Floats:
    """Return ``numpy.einsum``, which leaves BLAS alone and with it the threads of OpenBLAS.

    A product of a matrix and a vector waits for memory: two threads are no faster at it than one,
    and where other work has the cores each block waits for both.
    """
    product: Floats = np.einsum(indices, left, right)
    return product


def _share_of(rows: npt.NDArray[np.intp], n: int) -> Floats:
    weights = np.zeros(n)
    weights[rows] = 1 / len(rows)
    return weights


def _norms(updates: Updates) -> Floats:
    """Return each row's L2 norm ``(n,)``; no square leaves a float's range on the way."""
    largest = np.zeros(len(updates))
    for where in _blocks(updates):
        np.maximum(largest, np.abs(_floats(updates[:, where])).max(axis=1), out=largest)
    safe = np.where(largest > 0, largest, 1.0)
    squares = np.zeros(len(updates))
    for where in _blocks(updates):
        squares += np.square(_floats(updates[:, where]) / safe[:, None]).sum(axis=1)
    with np.errstate(over="ignore"):
        return largest * np.sqrt(squares)


def _shrinking(norms: Floats, limit: float) -> Floats:
    """Return the factors that bring norms to ``limit`` at most."""
    factors = np.ones_like(norms)
    np.divide(limit, norms, out=factors, where=norms > limit)
    return factors


def _distances(updates: Updates) -> Floats:
    """Return the squared distances between rows ``(n, n)``, infinite on the diagonal.

    From the Gram matrix, in float64: rows nearer to each other than 10⁻⁸ of their norms are
    taken to be at a distance of about zero. A distance too large for a float is infinite.
    """
    gram = np.zeros((len(updates), len(updates)))
    with np.errstate(over="ignore", invalid="ignore"):
        for where in _blocks(updates):
            block = _floats(updates[:, where])
            gram += block @ block.T
        norms = np.diagonal(gram)
        found = norms[:, None] + norms[None, :] - 2 * gram
    found = np.where(np.isnan(found), np.inf, np.maximum(found, 0.0))
    np.fill_diagonal(found, np.inf)
    return found


def _scores(distances: Floats, byzantine: int) -> Floats:
    """Return the sum of each row's n - f - 2 least distances, of one of them at least."""
    n = len(distances)
    count = min(max(n - byzantine - 2, 1), n - 1)
    if not count:
        return np.zeros(n)
    with np.errstate(over="ignore"):
        return np.asarray(np.partition(distances, count - 1, axis=1)[:, :count].sum(axis=1))
