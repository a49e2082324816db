"""Reads a page of Prometheus metrics with the library's own parser."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


def read_metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample by name; those with labels beside the model's name by name and label values, as `name{a,b}`."""
    response = http.get("/metrics")
    assert response.status_code == 200, response.text
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            samples[f"{sample.name}{{{','.join(labels)}}}" if labels else sample.name] = sample.value
    return samples


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much each sample is larger, for those that are."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value > before.get(name, 0.0)}
