"""What sampling needs, from greedy to log-probabilities, and what a request's options ask for."""

from __future__ import annotations

from enum import IntEnum

from protocol.messages import AdmittedSlot


class SamplingVariant(IntEnum):
    """What the rows of a step need. Each does all that those before it do; the first that serves all rows is run."""

    GREEDY = 0
    PLAIN = 1  # some row has a temperature
    FULL = 2  # some row with a temperature has a min-p, top-k or top-p
    EDITED = 3  # some row's logits are changed before: penalties, bias, tokens that may not be drawn
    LOGPROBS = 4  # some row wants log-probabilities


def variant_of(admitted: AdmittedSlot) -> SamplingVariant:
    if admitted.num_logprobs is not None:
        return SamplingVariant.LOGPROBS
    if admitted.edits is not None:
        return SamplingVariant.EDITED
    if admitted.temperature == 0:
        return SamplingVariant.GREEDY
    filters = admitted.top_k > 0 or admitted.top_p < 1 or admitted.min_p > 0
    return SamplingVariant.FULL if filters else SamplingVariant.PLAIN
