"""Compiled loops of the assignment engine (numba, extra ``fast``); imported only when a large problem is solved.

``costs`` is a C-contiguous (rows, columns) array of float32 or float64, never modified; ``sign`` is 1 to minimise
and -1 to maximise, so a pair costs ``sign * costs[i, j]``. ``prices`` are the column duals: the reduced cost of a
pair is ``sign * costs[i, j] - prices[j]``, and prices only ever fall.

Each row keeps a *shortlist*, ``choices[i]`` (columns) and ``offers[i]`` (their costs), whose last entries hold its
size and its *bound*: when the list was made, every column outside it had a reduced cost of at least the bound.
Prices fall, so reduced costs rise and the bound stays valid; a row is scanned again only when its list runs out.

A problem with more columns than rows is made square by *dummy* rows of cost zero, which are interchangeable and
therefore kept as one class: ``row_of[j] == DUMMY``. Constant rows belong to the same class.

Arrays are passed one by one, because fields of a tuple cost reference counts, together a third of a scan's time.
All loops are in this one file, because numba's cache of a function does not notice changes in another file.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FREE = -1
DUMMY = -2
GROUPS = 128  # lanes of a scan: column j is in group j % GROUPS; a power of two, longer than any vector
CAPACITY = 32  # longest shortlist
SIZE = BOUND = CAPACITY  # where choices[i] keeps the size and offers[i] the bound

# Rows of the work arrays of a search; its heap holds columns j, and columns + i for a due scan of row i.
DISTANCE, BASE, HORIZON = (
    0,
    1,
    2,
)  # lengths: of nodes; of row i minus its dual; reduced cost row i has seen up to
HEAP, PLACE, TREE, PARENT, ORDER, GOAL = 0, 1, 2, 3, 4, 5  # links
_SETTLED = -2
_TURN = 37  # each row looks at the groups from another one on
_LARGEST = 1.7e308
_UNCACHED = 2**20  # entries beyond the second cache of a core

_compiled = njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def survey(costs, sign, least, constant):
    """Fill the column minima and mark constant rows; return 0, or NaN when an entry is not finite."""
    rows, columns = costs.shape
    zeros = np.zeros(columns)
    for j in range(columns):
        least[j] = np.inf
    for i in range(0, rows, 4):  # four rows at a time halve the traffic; the last row may be seen again
        k, l, m = min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1)  # noqa: E741
        for j in range(columns):
            a, b = sign * costs[i, j], sign * costs[k, j]
            c, d = sign * costs[l, j], sign * costs[m, j]
            zeros[j] += (a * 0.0 + b * 0.0) + (c * 0.0 + d * 0.0)
            a = a if a < b else b
            c = c if c < d else d
            a = a if a < c else c
            least[j] = a if a < least[j] else least[j]
    for i in range(rows):
        first = costs[i, 0]
        same = np.isfinite(first) and first == costs[i, columns // 2] and first == costs[i, columns - 1]
        j = 0
        while same and j < columns:
            same = costs[i, j] == first
            j += 1
        constant[i] = same
    return zeros.sum()


@_compiled
def _group_minima(costs, sign, i, prices, minima):
    """Reduced costs of row ``i``, minimised over each group of columns; written so that it vectorises."""
    columns = costs.shape[1]
    for g in range(GROUPS):
        minima[g] = np.inf
    whole = columns // GROUPS
    for t in range(whole):
        start = t * GROUPS
        for g in range(GROUPS):
            reduced = sign * costs[i, start + g] - prices[start + g]
            minima[g] = reduced if reduced < minima[g] else minima[g]
    start = whole * GROUPS
    for g in range(columns - start):
        reduced = sign * costs[i, start + g] - prices[start + g]
        minima[g] = reduced if reduced < minima[g] else minima[g]


@_compiled
def _four_minima(costs, sign, i, k, l, m, prices, minima):  # noqa: E741
    """Like ``_group_minima`` for four rows, one after the other in ``minima``.

    Four streams from memory hide its delay, and prices are read once.
    """
    columns = costs.shape[1]
    for g in range(4 * GROUPS):
        minima[g] = np.inf
    whole = columns // GROUPS
    for t in range(whole):  # a fixed length is what makes the inner loop vectorise
        start = t * GROUPS
        for g in range(GROUPS):
            price = prices[start + g]
            a, b = sign * costs[i, start + g] - price, sign * costs[k, start + g] - price
            c, d = sign * costs[l, start + g] - price, sign * costs[m, start + g] - price
            minima[g] = a if a < minima[g] else minima[g]
            minima[GROUPS + g] = b if b < minima[GROUPS + g] else minima[GROUPS + g]
            minima[2 * GROUPS + g] = c if c < minima[2 * GROUPS + g] else minima[2 * GROUPS + g]
            minima[3 * GROUPS + g] = d if d < minima[3 * GROUPS + g] else minima[3 * GROUPS + g]
    start = whole * GROUPS
    for g in range(columns - start):
        price = prices[start + g]
        a, b = sign * costs[i, start + g] - price, sign * costs[k, start + g] - price
        c, d = sign * costs[l, start + g] - price, sign * costs[m, start + g] - price
        minima[g] = a if a < minima[g] else minima[g]
        minima[GROUPS + g] = b if b < minima[GROUPS + g] else minima[GROUPS + g]
        minima[2 * GROUPS + g] = c if c < minima[2 * GROUPS + g] else minima[2 * GROUPS + g]
        minima[3 * GROUPS + g] = d if d < minima[3 * GROUPS + g] else minima[3 * GROUPS + g]


@_compiled
def _next_minima(costs, sign, rows, k, prices, four, minima):
    """Fill the group minima of row ``rows[k]``; called for all ``k`` in turn, it scans at every fourth.

    Rows of a matrix that fits a core's cache are scanned one by one.
    """
    if costs.size < _UNCACHED:
        _group_minima(costs, sign, rows[k], prices, minima)
        return
    if k % 4 == 0:
        last = rows.shape[0] - 1
        second, third, fourth = min(k + 1, last), min(k + 2, last), min(k + 3, last)
        _four_minima(costs, sign, rows[k], rows[second], rows[third], rows[fourth], prices, four)
    for g in range(GROUPS):
        minima[g] = four[(k % 4) * GROUPS + g]


@_compiled
def _useful_minima(costs, sign, i, prices, floor, base, lengths, minima):
    """Like ``_group_minima``, over the reduced costs above ``floor`` that would shorten a column's path."""
    columns = costs.shape[1]
    for g in range(GROUPS):
        minima[g] = np.inf
    for start in range(0, columns, GROUPS):
        for g in range(min(GROUPS, columns - start)):
            reduced = sign * costs[i, start + g] - prices[start + g]
            useful = reduced > floor and base + reduced < lengths[DISTANCE, start + g]
            reduced = reduced if useful else np.inf
            minima[g] = reduced if reduced < minima[g] else minima[g]


@_compiled
def row_minima(costs, sign, prices, least):
    """Fill ``least[i]`` with the smallest reduced cost of each row: the row duals."""
    rows = np.arange(costs.shape[0])
    four, minima = np.empty(4 * GROUPS), np.empty(GROUPS)
    for i in range(costs.shape[0]):
        _next_minima(costs, sign, rows, i, prices, four, minima)
        least[i] = _cut(minima, 1)


@_compiled
def _rounded_off(cost, price):
    """Return the rounding error of ``cost - price`` (Knuth's two-sum); ``cost`` must be finite."""
    reduced = cost - price
    back = reduced - cost
    return (cost - (reduced - back)) + (-price - back)


@_compiled
def prove(costs, sign, prices, column_of, duals, slack, loss):
    """Fill the row duals, rounded down so that they are feasible, and how tight each row's pair is.

    ``slack[i]`` is what the pair of row ``i`` costs above the row's cheapest at these prices, ``loss[i]`` what rounding
    the dual took, both as if computed without rounding (up to one in the last place of theirs).
    """
    columns = costs.shape[1]
    rows = np.arange(costs.shape[0])
    four, minima = np.empty(4 * GROUPS), np.empty(GROUPS)
    for i in range(costs.shape[0]):
        _next_minima(costs, sign, rows, i, prices, four, minima)
        best = _cut(minima, 1)
        rest = np.inf  # of the columns that round to the minimum, the least has the least remainder
        for g in range(GROUPS):
            if minima[g] == best:
                for j in range(g, columns, GROUPS):
                    cost = sign * costs[i, j]
                    if cost - prices[j] == best:
                        rest = min(rest, _rounded_off(cost, prices[j]))
        duals[i] = best if rest >= 0.0 else np.nextafter(best, -np.inf)
        loss[i] = (best - duals[i]) + rest
        j = column_of[i]
        cost = sign * costs[i, j]
        slack[i] = (cost - prices[j] - best) + (_rounded_off(cost, prices[j]) - rest)


@_compiled
def _cut(minima, lanes):
    """Return a threshold that at least ``lanes`` columns meet, on average about ``lanes * log(lanes) + lanes``.

    The groups are dealt to ``lanes`` hands (1, 2, 4 or 8); the cut is the worst among the hands' best cards.
    """
    a, b, c, d = minima[0], minima[1], minima[2], minima[3]
    e, f, g, h = minima[4], minima[5], minima[6], minima[7]
    for t in range(8, GROUPS, 8):
        a = minima[t] if minima[t] < a else a
        b = minima[t + 1] if minima[t + 1] < b else b
        c = minima[t + 2] if minima[t + 2] < c else c
        d = minima[t + 3] if minima[t + 3] < d else d
        e = minima[t + 4] if minima[t + 4] < e else e
        f = minima[t + 5] if minima[t + 5] < f else f
        g = minima[t + 6] if minima[t + 6] < g else g
        h = minima[t + 7] if minima[t + 7] < h else h
    if lanes == 8:
        return max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))
    a, b, c, d = min(a, e), min(b, f), min(c, g), min(d, h)
    if lanes == 4:
        return max(max(a, b), max(c, d))
    if lanes == 2:
        return max(min(a, c), min(b, d))
    return min(min(a, c), min(b, d))


@_compiled
def _collect(costs, sign, i, prices, minima, cut, picked):
    """Write the columns of row ``i`` whose reduced cost is at most ``cut`` into ``picked``; return how many."""
    columns = costs.shape[1]
    groups = 0
    for t in range(GROUPS):
        g = (t + _TURN * i) & (GROUPS - 1)
        picked[columns + 1 + groups] = g
        groups += 1 if minima[g] <= cut else 0
    count = 0
    for t in range(groups):
        for j in range(picked[columns + 1 + t], columns, GROUPS):
            picked[count] = j
            count += 1 if sign * costs[i, j] - prices[j] <= cut else 0
    return count


@_compiled
def _shortlist(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers):
    """Scan row ``i`` and renew its shortlist and bound at the present prices."""
    _group_minima(costs, sign, i, prices, minima)
    _list(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers)


@_compiled
def _list(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers):
    """Renew the shortlist and bound of row ``i`` from the minima of its groups at the present prices."""
    bound = _cut(minima, lanes)
    count = _collect(costs, sign, i, prices, minima, min(bound, _LARGEST), picked)
    while count > CAPACITY and lanes > 1:
        lanes //= 2
        bound = _cut(minima, lanes)
        count = _collect(costs, sign, i, prices, minima, min(bound, _LARGEST), picked)
    if count > CAPACITY:
        # More ties at the minimum than places: any of them will do, free ones best. The bound is the minimum.
        front = 0
        for p in range(count):
            j = picked[p]
            if row_of[j] == FREE:
                picked[p] = picked[front]
                picked[front] = j
                front += 1
        count = CAPACITY
    for p in range(count):
        j = picked[p]
        choices[i, p] = j
        offers[i, p] = sign * costs[i, j]
    choices[i, SIZE] = count
    offers[i, BOUND] = bound


@_compiled
def seed_rows(costs, sign, lanes, active, prices, row_of, picked, choices, offers, least, gaps, taken):
    """Make the shortlists of all active rows.

    Fills their smallest reduced costs (``least``) and the ``gaps`` from there to the second smallest; returns how
    many distinct columns are some row's favourite. Rows with several favourites name different ones.
    """
    four, minima = np.empty(4 * GROUPS), np.empty(GROUPS)
    distinct = 0
    for k in range(active.shape[0]):
        i = active[k]
        _next_minima(costs, sign, active, k, prices, four, minima)
        _list(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers)
        best, second, choice = _best_two(i, prices, row_of, choices, offers)
        least[i] = best
        gaps[k] = min(second, offers[i, BOUND]) - best
        if choice == FREE:
            continue
        turn = i // GROUPS
        for q in range(choices[i, SIZE]):
            p = (q + turn) % choices[i, SIZE]
            if offers[i, p] - prices[choices[i, p]] == best:
                choice = choices[i, p]
                break
        distinct += 0 if taken[choice] else 1
        taken[choice] = True
    return distinct


@_compiled
def _best_two(i, prices, row_of, choices, offers):
    """Return the two smallest reduced costs on the list of row ``i``, and the column of the smallest.

    Among equals a free column comes first.
    """
    best = np.inf
    second = np.inf
    choice = FREE
    for p in range(choices[i, SIZE]):
        j = choices[i, p]
        reduced = offers[i, p] - prices[j]
        if reduced <= second:
            if reduced < best:
                second = best
                best = reduced
                choice = j
            else:
                second = reduced
                if reduced == best and row_of[j] == FREE:
                    choice = j
    return best, second, choice


@_compiled
def _two_groups(minima):
    """Return the smallest minimum, its group, and the smallest minimum of the other groups, which it erases."""
    best = _cut(minima, 1)
    home = 0
    while minima[home] != best:
        home += 1
    minima[home] = np.inf
    return best, home, _cut(minima, 1)


@_compiled
def favourites(costs, sign, rows, prices, choices, offers, least, gaps, taken):
    """Make shortlists of one column, the best, for some rows: at half the cost of :func:`seed_rows`.

    Fills and returns the same. Enough where nearly all rows get their favourites, and never wrong.
    """
    columns = costs.shape[1]
    four, minima = np.empty(4 * GROUPS), np.empty(GROUPS)
    distinct = 0
    for k in range(rows.shape[0]):
        i = rows[k]
        _next_minima(costs, sign, rows, k, prices, four, minima)
        best, home, second = _two_groups(minima)
        choice = FREE
        for j in range(home, columns, GROUPS):
            reduced = sign * costs[i, j] - prices[j]
            if reduced == best and choice == FREE and best < np.inf:
                choice = j
            else:
                second = reduced if reduced < second else second
        least[i] = best
        gaps[k] = second - best
        choices[i, SIZE] = 0
        offers[i, BOUND] = second
        if choice != FREE:
            choices[i, 0] = choice
            offers[i, 0] = sign * costs[i, choice]
            choices[i, SIZE] = 1
            distinct += 0 if taken[choice] else 1
            taken[choice] = True
    return distinct


@_compiled
def _dummies_best_two(prices, row_of, minima):
    """Like ``_best_two`` for a dummy: minus the two highest prices among the columns that no dummy holds."""
    columns = prices.shape[0]
    for g in range(GROUPS):
        minima[g] = np.inf
    for start in range(0, columns, GROUPS):
        for g in range(min(GROUPS, columns - start)):
            reduced = -prices[start + g] if row_of[start + g] != DUMMY else np.inf
            minima[g] = reduced if reduced < minima[g] else minima[g]
    best, home, second = _two_groups(minima)
    choice = FREE
    for j in range(home, columns, GROUPS):
        if row_of[j] != DUMMY:
            if -prices[j] == best and choice == FREE:
                choice = j
            else:
                second = min(second, -prices[j])
    return best, second, choice


@_compiled
def auction(
    costs,
    sign,
    epsilon,
    reach,
    lanes,
    bids,
    patience,
    stack,
    progress,
    prices,
    row_of,
    column_of,
    minima,
    picked,
    choices,
    offers,
):
    """Let unassigned rows bid until all are served or ``bids`` are spent (Bertsekas' forward auction).

    ``stack[:progress[0]]`` holds the unassigned rows and ``progress[1]`` counts unassigned dummies; both are
    updated, so that a call resumes where the last one stopped. ``progress[2]`` sums bids, ``progress[3]`` scans.
    Rows evict one another in chains; one longer than ``patience`` is a price war, and the row then bidding is
    given up (it stays unassigned). With ``epsilon`` zero so is a row whose two best columns tie and are held, and
    every assigned pair is tight. ``reach`` stands for the second best of a row with a single choice.

    Returns False when some row has no finite cost.
    """
    left = bids
    while left > 0:
        if progress[0] > 0:
            progress[0] -= 1
            i = stack[progress[0]]
        elif progress[1] > 0:
            i = DUMMY
        else:
            break
        chain = patience
        while left > 0:
            if chain == 0:
                i = FREE
                break
            chain -= 1
            left -= 1
            progress[2] += 1
            if i == DUMMY:
                best, second, j = _dummies_best_two(prices, row_of, minima)
                step = second - best
            else:
                best, second, j = _best_two(i, prices, row_of, choices, offers)
                missing = j == FREE or best > offers[i, BOUND]
                if missing or (epsilon == 0.0 and best == offers[i, BOUND] and row_of[j] != FREE):
                    _shortlist(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers)
                    progress[3] += 1
                    best, second, j = _best_two(i, prices, row_of, choices, offers)
                    if j == FREE:
                        return False
                step = min(second, offers[i, BOUND]) - best
            step = (step if step < np.inf else reach) + epsilon
            holder = row_of[j]
            if holder != FREE and step <= 0.0:
                if i == DUMMY:
                    progress[1] = 0
                i = FREE
                break
            if epsilon > 0.0 or holder != FREE:
                prices[j] -= step
            if i == DUMMY:
                row_of[j] = DUMMY
                progress[1] -= 1
            else:
                row_of[j] = i
                column_of[i] = j
            i = FREE
            if holder == FREE:
                break
            if holder == DUMMY:
                progress[1] += 1
                break
            column_of[holder] = FREE
            i = holder
        if i >= 0:
            stack[progress[0]] = i
            progress[0] += 1
    return True


@_compiled
def level_dummies(prices, row_of, exact):
    """Put the columns held by dummies at one price: the lowest of theirs.

    With ``exact`` it must be the highest price of all, so that they are tight; columns below are released.
    """
    held = np.inf
    highest = -np.inf
    for j in range(prices.shape[0]):
        if row_of[j] == DUMMY:
            held = prices[j] if prices[j] < held else held
        else:
            highest = prices[j] if prices[j] > highest else highest
    level = highest if exact and highest > held else held
    for j in range(prices.shape[0]):
        if row_of[j] == DUMMY:
            if prices[j] < level:
                row_of[j] = FREE
            else:
                prices[j] = level


@_compiled
def match_tight(costs, sign, active, prices, row_of, column_of, minima, seen, steps, duals):
    """Augment along tight pairs alone, depth first; return the number of rows served.

    A quick pass for matrices full of ties. Every column is entered at most once, and every row looks through its
    columns at most twice: for a free one, and for one to enter.
    """
    columns = costs.shape[1]
    look, enter, stack = steps[0], steps[1], steps[2]
    seen[:] = False
    look[:] = 0
    enter[:] = 0
    served = 0
    for k in range(active.shape[0]):
        if column_of[active[k]] != FREE:
            continue
        stack[0] = active[k]
        _group_minima(costs, sign, active[k], prices, minima)
        duals[0] = _cut(minima, 1)
        depth = 0 if duals[0] < np.inf else -1
        while depth >= 0:
            i = stack[depth]
            j = look[i]
            while j < columns and (row_of[j] != FREE or sign * costs[i, j] - prices[j] > duals[depth]):
                j += 1
            look[i] = j
            if j < columns:
                while depth >= 0:
                    i = stack[depth]
                    row_of[j] = i
                    following = column_of[i]
                    column_of[i] = j
                    j = following
                    depth -= 1
                served += 1
                break
            j = enter[i]
            while j < columns and (seen[j] or row_of[j] < 0 or sign * costs[i, j] - prices[j] > duals[depth]):
                j += 1
            enter[i] = j
            if j == columns:
                depth -= 1
                continue
            seen[j] = True
            depth += 1
            stack[depth] = row_of[j]
            duals[depth] = sign * costs[row_of[j], j] - prices[j]
    return served


@_compiled
def _offer(x, length, eager, size, lengths, links):
    """Put node ``x`` on the heap at ``length``, or move it up to there; return the heap's size.

    An ``eager`` node comes before its equals.
    """
    lengths[DISTANCE, x] = length
    p = links[PLACE, x]
    if p < 0:
        p = size
        size += 1
    while p > 0:
        q = (p - 1) >> 1
        y = links[HEAP, q]
        if lengths[DISTANCE, y] < length or (lengths[DISTANCE, y] == length and not eager):
            break
        links[HEAP, p] = y
        links[PLACE, y] = p
        p = q
    links[HEAP, p] = x
    links[PLACE, x] = p
    return size


@_compiled
def _take(size, lengths, links):
    """Remove the nearest node from a heap of ``size`` nodes and return it."""
    first = links[HEAP, 0]
    links[PLACE, first] = _SETTLED
    size -= 1
    if size == 0:
        return first
    x = links[HEAP, size]
    length = lengths[DISTANCE, x]
    p = 0
    while True:
        q = 2 * p + 1
        if q >= size:
            break
        if q + 1 < size and lengths[DISTANCE, links[HEAP, q + 1]] < lengths[DISTANCE, links[HEAP, q]]:
            q += 1
        y = links[HEAP, q]
        if lengths[DISTANCE, y] >= length:
            break
        links[HEAP, p] = y
        links[PLACE, y] = p
        p = q
    links[HEAP, p] = x
    links[PLACE, x] = p
    return first


@_compiled
def _reach(j, i, branch, length, size, row_of, lengths, links):
    """Offer column ``j`` a path of the given length through row ``i``; return the heap's size."""
    if length < lengths[DISTANCE, j] and links[PLACE, j] != _SETTLED:
        links[PARENT, j] = i
        links[TREE, j] = branch
        size = _offer(j, length, row_of[j] == FREE, size, lengths, links)
    return size


@_compiled
def _reach_list(i, branch, size, prices, row_of, choices, offers, lengths, links):
    """Offer the listed columns a path through row ``i``; schedule a scan for when its bound is reached."""
    columns = prices.shape[0]
    base = lengths[BASE, i]
    for p in range(choices[i, SIZE]):
        j = choices[i, p]
        size = _reach(j, i, branch, base + (offers[i, p] - prices[j]), size, row_of, lengths, links)
    bound = offers[i, BOUND]
    lengths[HORIZON, i] = bound
    links[TREE, columns + i] = branch
    if bound < np.inf:
        size = _offer(columns + i, base + bound, False, size, lengths, links)
    return size


@_compiled
def _reach_beyond(costs, sign, i, strict, branch, size, prices, row_of, minima, picked, lengths, links):
    """Offer the next nearest columns past the horizon of row ``i`` a path, and move the horizon."""
    columns = costs.shape[1]
    horizon = lengths[HORIZON, i]
    base = lengths[BASE, i]
    floor = horizon if strict else np.nextafter(horizon, -np.inf)
    _useful_minima(costs, sign, i, prices, floor, base, lengths, minima)
    cut = _cut(minima, 8)
    for p in range(_collect(costs, sign, i, prices, minima, min(cut, _LARGEST), picked)):
        j = picked[p]
        size = _reach(j, i, branch, base + (sign * costs[i, j] - prices[j]), size, row_of, lengths, links)
    lengths[HORIZON, i] = max(cut, np.nextafter(horizon, np.inf))
    if cut < np.inf:
        size = _offer(columns + i, base + cut, False, size, lengths, links)
    return size


@_compiled
def _plant(
    costs,
    sign,
    lanes,
    active,
    size,
    prices,
    row_of,
    column_of,
    minima,
    picked,
    choices,
    offers,
    lengths,
    links,
):
    """Start a tree at each unassigned active row; return the heap's size and the number of trees, or -1."""
    trees = 0
    for k in range(active.shape[0]):
        i = active[k]
        if column_of[i] != FREE:
            continue
        best, _, choice = _best_two(i, prices, row_of, choices, offers)
        if choice == FREE or best > offers[i, BOUND]:
            _shortlist(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers)
            best, _, choice = _best_two(i, prices, row_of, choices, offers)
            if choice == FREE:
                return size, -1
        lengths[BASE, i] = -best
        size = _reach_list(i, i, size, prices, row_of, choices, offers, lengths, links)
        trees += 1
    return size, trees


@_compiled
def _augment(branch, entry, rows, row_of, column_of, links):
    """Swap the pairs along the path of a served branch."""
    j = links[GOAL, branch]
    while j >= 0:
        i = links[PARENT, j]
        if i == DUMMY:
            row_of[j] = DUMMY
            j = entry if branch < rows else FREE
        else:
            row_of[j] = i
            following = column_of[i]
            column_of[i] = j
            j = following


@_compiled
def forest(
    costs,
    sign,
    lanes,
    active,
    supply,
    prices,
    row_of,
    column_of,
    minima,
    picked,
    choices,
    offers,
    lengths,
    links,
):
    """Grow shortest-path trees from all unassigned rows at once; augment every tree that met a free column.

    Dijkstra's algorithm over columns, with reduced costs as lengths; every assigned pair must be tight. One tree
    grows from each unassigned active row. With ``supply`` unassigned dummies one branch grows from each column,
    for a dummy goes anywhere, and up to ``supply`` branches may be served. Trees are disjoint, hence so are the
    paths. Lowering each settled column by its distance to the last goal keeps all reduced costs non-negative and
    makes all those paths tight. The search ends once served trees become rare.

    Returns the number of augmented paths; none means that no pairing is complete.
    """
    rows, columns = costs.shape
    lengths[DISTANCE, :] = np.inf
    links[PLACE, :] = FREE
    links[GOAL, :] = FREE
    size, wanted = _plant(
        costs,
        sign,
        lanes,
        active,
        0,
        prices,
        row_of,
        column_of,
        minima,
        picked,
        choices,
        offers,
        lengths,
        links,
    )
    if wanted < 0:
        return 0
    wanted += supply
    spare = supply
    entry = FREE  # the column through which the dummies were reached
    if supply > 0:
        highest = prices.max()
        for j in range(columns):
            size = _reach(j, DUMMY, rows + j, highest - prices[j], size, row_of, lengths, links)
    served, settled, last, radius = 0, 0, 0, 0.0
    while size > 0 and served < wanted:
        x = _take(size, lengths, links)
        size -= 1
        length = lengths[DISTANCE, x]
        branch = links[TREE, x]
        if x >= columns:
            i = x - columns
            links[PLACE, x] = FREE
            horizon = lengths[HORIZON, i]
            listed = horizon == offers[i, BOUND]
            if listed:
                _shortlist(costs, sign, i, lanes, prices, row_of, minima, picked, choices, offers)
            if offers[i, BOUND] > horizon:
                size = _reach_list(i, branch, size, prices, row_of, choices, offers, lengths, links)
            else:
                # The list ends before columns already offered: look past them, for this search only. Columns
                # at the bound itself may not have been offered, so the first look is not strict.
                size = _reach_beyond(
                    costs, sign, i, not listed, branch, size, prices, row_of, minima, picked, lengths, links
                )
            continue
        links[ORDER, settled] = x
        settled += 1
        i = row_of[x]
        if i >= 0:
            lengths[BASE, i] = length - (sign * costs[i, x] - prices[x])
            size = _reach_list(i, branch, size, prices, row_of, choices, offers, lengths, links)
        elif i == FREE:
            if links[GOAL, branch] == FREE and (branch < rows or spare > 0):
                spare -= 1 if branch >= rows else 0
                links[GOAL, branch] = x
                served, last, radius = served + 1, settled, length
        elif supply == 0 and entry == FREE:
            entry = x
            for j in range(columns):
                size = _reach(
                    j, DUMMY, branch, length + (prices[x] - prices[j]), size, row_of, lengths, links
                )
        if served > 0 and (settled - last - 8) * served > 2 * last:
            break
    for t in range(settled):
        j = links[ORDER, t]
        if lengths[DISTANCE, j] < radius:
            prices[j] -= radius - lengths[DISTANCE, j]
    for branch in range(rows + columns):
        if links[GOAL, branch] != FREE:
            _augment(branch, entry, rows, row_of, column_of, links)
    return served


@_compiled
def sample(costs, rows, step):
    """Copy the given rows at every ``step``-th column."""
    columns = (costs.shape[1] + step - 1) // step
    part = np.empty((rows.shape[0], columns), costs.dtype)
    for a in range(rows.shape[0]):
        for b in range(columns):
            part[a, b] = costs[rows[a], b * step]
    return part


@_compiled
def transform(costs, sign, rows, row_duals, prices):
    """Fill the highest prices that keep the reduced costs of the given rows non-negative."""
    columns = costs.shape[1]
    for j in range(columns):
        prices[j] = np.inf
    for a in range(rows.shape[0]):
        i = rows[a]
        for j in range(columns):
            reduced = sign * costs[i, j] - row_duals[a]
            prices[j] = reduced if reduced < prices[j] else prices[j]


@_compiled
def fill(costs, sign, active, prices, row_of, column_of):
    """Pair the active rows left over with columns left over, greedily; return False if some row finds none."""
    for k in range(active.shape[0]):
        i = active[k]
        if column_of[i] != FREE:
            continue
        best = np.inf
        for j in range(costs.shape[1]):
            if row_of[j] < 0 and sign * costs[i, j] - prices[j] < best:
                best = sign * costs[i, j] - prices[j]
                column_of[i] = j
        if column_of[i] == FREE:
            return False
        row_of[column_of[i]] = i
    return True
