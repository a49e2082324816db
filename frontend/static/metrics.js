// From the text of /metrics to what the charts show: the state of the engine, and what changed since the last look.

/** Parses Prometheus's text format into a map from names to `[{ labels, value }]`. */
export function parse(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const [, name, labelText = "", value] = found;
    const labels = {};
    for (const [, label, quoted] of labelText.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = quoted.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
    }
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push({ labels, value: Number(value.replace("Inf", "Infinity")) });
  }
  return metrics;
}

const COUNTERS = {
  generated: "vllm:generation_tokens_total",
  prompt: "vllm:prompt_tokens_total",
  firstSeconds: "vllm:time_to_first_token_seconds_sum",
  firstTokens: "vllm:time_to_first_token_seconds_count",
  hits: "vllm:prefix_cache_hits_total",
  queries: "vllm:prefix_cache_queries_total",
};
const GAUGES = {
  running: "vllm:num_requests_running",
  waiting: "vllm:num_requests_waiting",
  cache: "vllm:kv_cache_usage_perc",
};

/** The values that the charts need, summed over label sets; null where the server does not say. */
export function snapshot(text, time) {
  const metrics = parse(text);
  const total = (name) => metrics.get(name)?.reduce((sum, sample) => sum + sample.value, 0) ?? null;
  const values = { time };
  for (const [key, name] of Object.entries({ ...COUNTERS, ...GAUGES })) values[key] = total(name);
  return values;
}

/**
 * A point of the charts from two snapshots, times in seconds: rates per second, shares from 0 to 1.
 * Null is what cannot be told: at the first look, after a restart, or where nothing happened to be measured.
 */
export function point(before, now) {
  const point = { time: now.time, running: now.running, waiting: now.waiting, cache: now.cache };
  const change = (key) => {
    if (before === null || before[key] === null || now[key] === null) return null;
    return now[key] < before[key] ? null : now[key] - before[key];
  };
  const ratio = (part, base) => (part !== null && base > 0 ? part / base : null);
  const seconds = before === null ? 0 : now.time - before.time;
  point.generated = ratio(change("generated"), seconds);
  point.prompt = ratio(change("prompt"), seconds);
  point.first = ratio(change("firstSeconds"), change("firstTokens"));
  point.hitRate = ratio(change("hits"), change("queries"));
  return point;
}
