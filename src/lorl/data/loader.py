"""Which prompts a step takes: a pure function of (seed, step), so that resuming needs one number."""

from collections.abc import Sequence

from lorl.errors import UserError
from lorl.experience import Prompt
from lorl.seeding import stable_seed


class PromptLoader:
    """Prompts in a counted order.

    Every epoch is a permutation of all prompts. Batches have one size and run on across an epoch's end, so that no
    prompt is dropped; such a batch never holds a prompt twice (its two groups would draw the same samples): prompts
    that the batch already took from the old epoch come a little later in the new one.
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, shuffle: bool, seed: int) -> None:
        """Take `prompts`, with distinct ids, in the order that holds when `shuffle` is off.

        Raises:
            UserError: There are fewer prompts than a step takes.
        """
        if len(prompts) < prompts_per_step:
            raise UserError(
                f"data.prompts_per_step={prompts_per_step} is more than the {len(prompts)} prompts of data.train; "
                f"use {len(prompts)} or fewer"
            )
        self.prompts = list(prompts)
        self.prompts_per_step = prompts_per_step
        self.shuffle = shuffle
        self.seed = seed
        self._orders: dict[int, list[int]] = {}  # of the last epochs asked for; a cache, not state

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every prompt was taken at least once."""
        return self.steps(1)

    def steps(self, epochs: int) -> int:
        """Steps until every prompt was taken at least `epochs` times."""
        return -(-epochs * len(self.prompts) // self.prompts_per_step)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the batch of `step` starts in."""
        return step * self.prompts_per_step // len(self.prompts)

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of `step`, counted from 0."""
        first = step * self.prompts_per_step
        places = [divmod(i, len(self.prompts)) for i in range(first, first + self.prompts_per_step)]
        return [self.prompts[self._order(epoch)[i]] for epoch, i in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> list[int]:
        """The permutation of `epoch`: sorted by hash, then moved apart from the end of the epoch before.

        Moving apart touches the first `prompts_per_step` places only. With two batches or more in an epoch, the end of
        an epoch is thus free of the epoch before it; in a smaller one it is not, and the chain starts at epoch 0.
        """
        if not self.shuffle:
            return list(range(len(self.prompts)))
        start = max(epoch - 1, 0) if len(self.prompts) >= 2 * self.prompts_per_step else 0
        if epoch - 1 in self._orders:
            start = epoch - 1
        order = self._orders.get(start) or self._by_hash(start)
        for following in range(start + 1, epoch + 1):
            order = self._apart(order, self._by_hash(following), taken=following * len(self.prompts))
        return order

    def _by_hash(self, epoch: int) -> list[int]:
        # A sort by hash, because random generators' shuffles may change between library versions
        keys = [stable_seed(self.seed, "order", epoch, prompt.id) for prompt in self.prompts]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _apart(self, before: list[int], order: list[int], taken: int) -> list[int]:
        """`order`, with what the batch that is open at its start took from `before` moved behind that batch."""
        tail = taken % self.prompts_per_step
        open_batch = set(before[len(before) - tail :])
        head = [i for i in order if i not in open_batch][: self.prompts_per_step - tail] if tail else []
        in_head = set(head)
        return head + [i for i in order if i not in in_head]
