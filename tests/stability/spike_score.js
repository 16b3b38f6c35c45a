// Implements docs/spike_score.md version 1.0 ("Spike score"), and was written from that page alone.
//
// Usage: node spike_score.js FILE...
// Each FILE is JSON {"planned": [step, ...], "rows": [[step, loss, grad_norm, tokens, lr, samples_first,
// samples_last], ...]}; prints a JSON array with the document of each file, in order.
//
// Steps, tokens and sample numbers are BigInt throughout, losses and all other measures are doubles.
'use strict';

const fs = require('fs');

// ---- 1. Numbers ------------------------------------------------------------------------------------------------
const TWO_80 = 2 ** 80;
const BITS = new DataView(new ArrayBuffer(8));
const usable = (v) => v > -1e100 && v < 1e100;

/** 2 ** k as a double, for -1022 <= k <= 1023. */
function powerOfTwo(k) {
  BITS.setBigUint64(0, BigInt(k + 1023) << 52n);
  return BITS.getFloat64(0);
}

/** The finite double v as an exact integer multiple of 2^-1074. */
function inSmallestUnits(v) {
  BITS.setFloat64(0, v);
  const bits = BITS.getBigUint64(0);
  const exponent = (bits >> 52n) & 0x7ffn;
  const fraction = bits & 0xfffffffffffffn;
  const size = exponent === 0n ? fraction : (fraction | 0x10000000000000n) << (exponent - 1n);
  return bits >> 63n ? -size : size;
}

/** Number of binary digits of a positive BigInt. */
function bitLength(a) {
  const hex = a.toString(16);
  return 4 * hex.length - Math.clz32(parseInt(hex[0], 16)) + 28;
}

/** The double nearest to numerator / denominator (BigInt, denominator > 0), ties to even. */
function nearestDouble(numerator, denominator) {
  if (numerator === 0n) return 0;
  const size = numerator < 0n ? -numerator : numerator;
  const divide = (exponent) => (exponent < 0
    ? [size << BigInt(-exponent), denominator]
    : [size, denominator << BigInt(exponent)]);
  // size / denominator = q * 2^exponent, with q of at most 53 bits before rounding
  let exponent = Math.max(bitLength(size) - bitLength(denominator) - 53, -1074);
  let [a, b] = divide(exponent);
  if (a / b >= 1n << 53n) {
    exponent += 1;
    [a, b] = divide(exponent);
  }
  let q = a / b;
  const twiceRest = 2n * (a - q * b);
  if (twiceRest > b || (twiceRest === b && (q & 1n))) q += 1n;
  if (exponent > 971) return numerator < 0n ? -Infinity : Infinity;
  const half = Math.trunc(exponent / 2); // two exact steps: 2^-1074 itself is no normal number
  const value = Number(q) * powerOfTwo(half) * powerOfTwo(exponent - half);
  return numerator < 0n ? -value : value;
}

/** The double nearest to the sum of doubles as a real number. */
function exactSum(values) {
  if (!values.every(Number.isFinite)) return values.reduce((a, b) => a + b, 0);
  return nearestDouble(values.reduce((sum, v) => sum + inSmallestUnits(v), 0n), 1n << 1074n);
}

/** A finite double rounded to an integer, halves to even, as BigInt. */
function roundHalfEven(v) {
  const floor = Math.floor(v);
  const rest = v - floor; // exact where there is a fraction at all
  const whole = BigInt(floor);
  return rest > 0.5 || (rest === 0.5 && (whole & 1n)) ? whole + 1n : whole;
}

function median(values) {
  const sorted = Float64Array.from(values).sort();
  const n = sorted.length;
  if (n === 0) return NaN;
  const middle = n >> 1;
  return n % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The last `size` values put in, with exact sums of their multiples of 2^-80. */
class Window {
  constructor(size, values = []) {
    Object.assign(this, { size, values: [], integers: [], sum: 0n, squares: 0n });
    for (const v of values) this.put(v);
  }
  get full() { return this.values.length === this.size; }
  put(v) {
    if (this.full) {
      this.values.shift();
      this.count(this.integers.shift(), -1n);
    }
    this.values.push(v);
    this.integers.push(BigInt(Math.trunc(v * TWO_80)));
    this.count(this.integers.at(-1), 1n);
  }
  count(w, sign) {
    this.sum += sign * w;
    this.squares += sign * w * w;
  }
  mean() {
    return this.values.length ? nearestDouble(this.sum, BigInt(this.values.length) << 80n) : NaN;
  }
  deviation() {
    const n = BigInt(this.values.length);
    return n ? Math.sqrt(nearestDouble(n * this.squares - this.sum * this.sum, (n * n) << 160n)) : NaN;
  }
  z(v) {
    const d = v - this.mean();
    const deviation = this.deviation();
    if (deviation > 0) return d / deviation;
    return d === 0 ? 0 : d * Infinity;
  }
}

/** Appends to a list of which the last `size` are kept. */
function appendLast(list, v, size) {
  list.push(v);
  if (list.length > size) list.shift();
}

// ---- 2. The curve ----------------------------------------------------------------------------------------------
const isFiniteRow = (row) => usable(row.loss) && (Number.isNaN(row.gradNorm) || usable(row.gradNorm));
const NAMED = { nan: NaN, inf: Infinity, '-inf': -Infinity };

/** A double of the file (long integers arrive as strings, see readCurve). */
function readNumber(v, unknown) {
  if (v === null || v === undefined) return unknown;
  if (typeof v === 'string') return v in NAMED ? NAMED[v] : Number(v);
  return v;
}

const readInteger = (v, unknown) => (v === null || v === undefined ? unknown : BigInt(v));
const byStep = (a, b) => (a.step < b.step ? -1 : a.step > b.step ? 1 : 0);

/** The curve of a file's text: rows by rising step, the planned steps and the number of rows left out. */
function readCurve(text) {
  // integers that a double might not hold are quoted first, so that they stay exact
  const data = JSON.parse(text.replace(/(?<=[[,:]\s*)-?\d{16,}(?=\s*[,\]}])/g, '"$&"'));
  const lastOfStep = new Map();
  let seen = 0;
  for (const [step, loss, gradNorm, tokens, lr, first, last] of data.rows) {
    if (loss === null || loss === undefined) continue;
    seen += 1;
    const row = {
      step: BigInt(step),
      loss: readNumber(loss, NaN),
      gradNorm: readNumber(gradNorm, NaN),
      tokens: readInteger(tokens, 0n),
      lr: readNumber(lr, NaN),
      samplesFirst: readInteger(first, -1n),
      samplesLast: readInteger(last, -1n),
    };
    lastOfStep.set(row.step, row);
  }
  const rows = [...lastOfStep.values()].sort(byStep);
  return { rows, planned: new Set((data.planned || []).map(BigInt)), repeatedSteps: seen - rows.length };
}

// ---- 3. What a loss is expected to be --------------------------------------------------------------------------
const KEPT = 128;
const SEED = 64;
const WAITING = 8;

function line(values) {
  const n = values.length;
  const half = Math.floor(n / 2);
  if (half === 0) return { newer: values[0], slope: 0, centre: 0 };
  const older = median(values.slice(0, half));
  const newer = median(values.slice(n - half));
  return { newer, slope: (newer - older) / (n - half), centre: n - (half + 1) / 2 };
}

function expectedNext(values) {
  const { newer, slope, centre } = line(values);
  return Math.max(newer + slope * (values.length - centre), Math.min(newer, median(values.slice(-8))));
}

function bounded(v) {
  if (usable(v)) return v;
  return v < 0 ? -5e99 : 5e99;
}

function boundedResiduals(values) {
  const { newer, slope, centre } = line(values);
  return values.map((v, i) => bounded(v - newer - slope * (i - centre)));
}

function spread(window) {
  const middle = median(window.values);
  const mad = median(window.values.map((v) => Math.abs(v - middle)));
  return Math.max(1.4826 * mad, window.deviation());
}

class Expectation {
  constructor(values = []) {
    Object.assign(this, { values: values.slice(), deviations: new Window(KEPT), waiting: [] });
    this.seed();
  }
  seed() {
    if (this.values.length >= SEED && this.deviations.values.length === 0) {
      this.deviations = new Window(KEPT, boundedResiduals(this.values));
    }
  }
  scale() {
    const known = this.deviations.values.length ? this.deviations : new Window(KEPT, boundedResiduals(this.values));
    return Math.max(spread(known), 0.001);
  }
  takeIn(loss, deviation) { // deviation: undefined if the loss was not judged
    appendLast(this.values, loss, KEPT);
    if (deviation !== undefined) {
      this.waiting.push(bounded(deviation));
      if (this.waiting.length > WAITING) this.deviations.put(this.waiting.shift());
    }
    this.seed();
  }
}

// ---- 4. Events -------------------------------------------------------------------------------------------------
class Events {
  constructor() {
    // `event` is the open one
    Object.assign(this, { list: [], event: null, expectation: new Expectation(), anyJudged: false });
  }
  see(row, gnormBefore) {
    if (this.event) this.inside(row);
    else this.outside(row, gnormBefore);
  }
  outside(row, gnormBefore) {
    const { values } = this.expectation;
    if (!isFiniteRow(row)) {
      if (values.length) this.open(row, expectedNext(values), this.expectation.scale(), gnormBefore);
      else this.open(row, NaN, 0.001, gnormBefore);
    } else if (values.length < SEED) {
      this.expectation.takeIn(row.loss);
    } else {
      this.anyJudged = true;
      const m = expectedNext(values);
      const s = this.expectation.scale();
      const deviation = row.loss - m;
      if (deviation / s >= 8) this.open(row, m, s, gnormBefore);
      else this.expectation.takeIn(row.loss, deviation);
    }
  }
  open(row, baseline, scale, gnormBefore) {
    this.event = {
      startStep: row.step, endStep: row.step, tokens: row.tokens, lr: row.lr,
      samplesFirst: row.samplesFirst, samplesLast: row.samplesLast,
      baseline, scale, gnormBefore, height: 0, area: 0, gnormPeak: NaN, nonfiniteSteps: 0, recovered: false, open: true,
    };
    this.list.push(this.event);
    this.expectation.waiting = [];
    Object.assign(this, { calm: [], recent: [], openSteps: 1 });
    this.add(row);
  }
  add(row) {
    const { event } = this;
    event.endStep = row.step;
    event.samplesLast = row.samplesLast;
    if (usable(row.loss)) appendLast(this.recent, row.loss, KEPT);
    if (!Number.isNaN(event.baseline)) {
      for (const loss of [...this.calm, row.loss]) {
        if (!usable(loss)) continue;
        event.height = Math.max(event.height, loss - event.baseline);
        event.area += Math.max(loss - event.baseline, 0);
      }
    }
    this.calm = [];
    if (!isFiniteRow(row)) event.nonfiniteSteps += 1;
    if (!Number.isNaN(row.gradNorm)) {
      event.gnormPeak = Number.isNaN(event.gnormPeak) ? row.gradNorm : Math.max(event.gnormPeak, row.gradNorm);
    }
  }
  inside(row) {
    const { event } = this;
    const finite = isFiniteRow(row);
    if (finite) this.anyJudged = true;
    this.openSteps += 1;
    const z = Number.isNaN(event.baseline) ? 0 : (row.loss - event.baseline) / event.scale;
    if (finite && z < 2) {
      this.calm.push(row.loss);
      appendLast(this.recent, row.loss, KEPT);
      if (this.calm.length === 3) {
        for (const loss of this.calm) this.expectation.takeIn(loss);
        this.close(true);
        return;
      }
    } else {
      this.add(row);
    }
    if (this.openSteps >= 2000) {
      event.endStep = row.step;
      this.expectation = new Expectation(this.recent);
      this.close(false);
    }
  }
  close(recovered) {
    this.event.open = false;
    this.event.recovered = recovered;
    this.event = null;
  }
  plannedChange() { // section 6
    if (this.event) this.close(false);
    this.expectation = new Expectation();
  }
}

const width = (event) => event.endStep - event.startStep + 1n;

function classOf(event) {
  if (event.open) return 'open';
  if (!event.recovered) return 'unrecovered';
  return width(event) <= 10n ? 'narrow' : 'wide';
}

// ---- 5. Divergence guard ---------------------------------------------------------------------------------------
class Guard {
  constructor() {
    this.fired = false;
    this.restart();
  }
  restart() {
    Object.assign(this, { window: new Window(100), inARow: 0, heldBack: [] });
  }
  see(loss) {
    if (!usable(loss)) return;
    if (this.window.full && loss >= 2 * this.window.mean()) {
      this.inARow += 1;
      appendLast(this.heldBack, loss, 5);
      if (this.inARow === 5) this.fired = true;
    } else {
      if (this.inARow < 5) for (const held of this.heldBack) this.window.put(held);
      this.window.put(loss);
      this.inARow = 0;
      this.heldBack = [];
    }
  }
}

// ---- 7. Scores of others ---------------------------------------------------------------------------------------
/** 100 * flagged / judged, over the last `size` judged values. */
function share(flags, size = Infinity) {
  const judged = flags.slice(-size);
  return judged.length ? (100 * judged.filter(Boolean).length) / judged.length : null;
}

class Signal {
  constructor() {
    Object.assign(this, { long: new Window(1000), short: new Window(128), bothSides: [], upward: [] });
  }
  see(v) {
    if (this.long.full) {
      const z = usable(v) ? this.long.z(v) : Infinity;
      this.bothSides.push(Math.abs(z) >= 7);
      this.upward.push(z >= 7);
    }
    if (usable(v)) {
      this.long.put(v);
      this.short.put(v);
    }
  }
}

// ---- 8. The document -------------------------------------------------------------------------------------------
/** Probability of N = k for a Poisson mean, in the saddle-point form, which loses no digits for large k. */
function poissonProbability(k, mean) {
  if (k === 0) return Math.exp(-mean);
  const t = (mean - k) / k;
  return Math.exp(-stirlingError(k) - k * (t - Math.log1p(t))) / Math.sqrt(2 * Math.PI * k);
}

/** ln k! - ln(sqrt(2 pi k) (k / e)^k) */
function stirlingError(k) {
  if (k < 16) {
    let factorial = 1;
    for (let i = 2; i <= k; i += 1) factorial *= i;
    return Math.log(factorial) - (k + 0.5) * Math.log(k) + k - 0.5 * Math.log(2 * Math.PI);
  }
  const kk = k * k;
  return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / kk) / kk) / kk) / kk) / k;
}

/** P(N >= k), for a mean below k. */
function upperTail(k, mean) {
  let [sum, term] = [0, 1];
  for (let i = k + 1; term > sum * 1e-18; i += 1) {
    sum += term;
    term *= mean / i;
  }
  return poissonProbability(k, mean) * sum;
}

/** P(N <= k), for a mean above k. */
function lowerTail(k, mean) {
  let [sum, term] = [0, 1];
  for (let i = k; i >= 0 && term > sum * 1e-18; i -= 1) {
    sum += term;
    term *= i / mean;
  }
  return poissonProbability(k, mean) * sum;
}

/** The mean between low and high at which `below` turns from true to false. */
function bisect(low, high, below) {
  for (;;) {
    const middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) return middle;
    if (below(middle)) low = middle;
    else high = middle;
  }
}

function poissonLimits(k) {
  return {
    low: k === 0 ? 0 : bisect(0, k, (mean) => upperTail(k, mean) < 0.025),
    high: bisect(k, k + 8 * Math.sqrt(k + 1), (mean) => lowerTail(k, mean) > 0.025),
  };
}

const nineDigits = (v) => Number(v.toPrecision(9));

function rate(count, exposure) {
  if (!(exposure > 0)) return { value: null, low: null, high: null };
  const { low, high } = poissonLimits(count);
  return { value: count / exposure, low: nineDigits(low / exposure), high: nineDigits(high / exposure) };
}

function tokensExposure(rows) {
  if (rows.length === 0) return 0n;
  const first = rows[0];
  const last = rows[rows.length - 1];
  if (rows.length === 1) return first.step === 1n && first.tokens > 0n ? first.tokens : 0n;
  if (!rows.every((row, i) => i === 0 || row.tokens > rows[i - 1].tokens)) return 0n;
  const b = last.step - first.step;
  return roundHalfEven(nearestDouble((last.tokens - first.tokens) * (b + 1n), b));
}

function eventDocument(e) {
  return {
    start_step: e.startStep, end_step: e.endStep, tokens: e.tokens, lr: e.lr,
    samples_first: e.samplesFirst, samples_last: e.samplesLast, baseline: e.baseline, scale: e.scale,
    gnorm_before: e.gnormBefore, height: e.height, area: e.area, gnorm_peak: e.gnormPeak,
    nonfinite_steps: e.nonfiniteSteps, recovered: e.recovered, open: e.open, width: width(e), class: classOf(e),
    rel_height: e.baseline === 0 ? NaN : e.height / Math.abs(e.baseline),
    gnorm_peak_ratio: e.gnormBefore > 0 ? e.gnormPeak / e.gnormBefore : NaN,
  };
}

const totals = (events) => ({
  events: events.length,
  steps: events.reduce((sum, e) => sum + width(e), 0n),
  area: exactSum(events.map((e) => e.area)),
  max_height: Math.max(0, ...events.map((e) => e.height)),
});

function document(curve) {
  const { rows, planned } = curve;
  const events = new Events();
  const guard = new Guard();
  const loss = new Signal();
  const gnorm = new Signal();
  for (const row of rows) {
    if (planned.has(row.step)) {
      events.plannedChange();
      guard.restart();
    }
    events.see(row, events.event ? NaN : gnorm.short.mean());
    loss.see(row.loss);
    if (!Number.isNaN(row.gradNorm)) gnorm.see(row.gradNorm);
    guard.see(row.loss);
  }
  const of = (...classes) => events.list.filter((e) => classes.includes(classOf(e)));
  const spikes = of('narrow', 'wide');
  const first = rows.length ? rows[0].step : 0n;
  const steps = rows.length ? rows[rows.length - 1].step - first + 1n : 0n;
  const tokens = tokensExposure(rows);
  const inFirstHalf = spikes.filter((e) => 2n * e.startStep < 2n * first + steps).length;
  const inSecondHalf = spikes.length - inFirstHalf;
  const all = totals(events.list);
  const saysNothing = rows.length === 0 || (!events.anyJudged && events.list.length === 0);
  const rateOf = (count, exposure) => rate(count, saysNothing ? 0 : exposure);
  const thousands = nearestDouble(steps, 1000n);
  const half = nearestDouble(steps, 2n);
  return {
    specification: '1.0',
    events: events.list.map(eventDocument),
    scores: {
      'spike/olmo_loss_score': share(loss.bothSides),
      'spike/olmo_loss_score_w10k': share(loss.bothSides, 10000),
      'spike/olmo_loss_up_score': share(loss.upward),
      'spike/olmo_gnorm_score': share(gnorm.bothSides),
      'spike/olmo_gnorm_score_w10k': share(gnorm.bothSides, 10000),
    },
    rates: {
      per_1k_steps: rateOf(spikes.length, thousands),
      per_billion_tokens: rateOf(spikes.length, nearestDouble(tokens, 1000000000n)),
      wide_per_1k_steps: rateOf(of('wide').length, thousands),
      first_half_per_1k_steps: rateOf(inFirstHalf, half / 1000),
      second_half_per_1k_steps: rateOf(inSecondHalf, (nearestDouble(steps, 1n) - half) / 1000),
    },
    summary: {
      steps, tokens,
      events_total: events.list.length, spikes: spikes.length, diverged: events.event !== null || guard.fired,
      narrow_total: of('narrow').length, wide_total: of('wide').length,
      unrecovered_total: of('unrecovered').length, open_total: of('open').length,
      nonfinite_steps: events.list.reduce((sum, e) => sum + e.nonfiniteSteps, 0),
      first_half: inFirstHalf, second_half: inSecondHalf,
      steps_in_spike_frac: saysNothing ? null : nearestDouble(all.steps, steps),
      area_total: all.area, max_height: all.max_height,
      by_class: Object.fromEntries(['narrow', 'wide', 'unrecovered', 'open'].map((name) => [name, totals(of(name))])),
      repeated_steps: curve.repeatedSteps,
    },
  };
}

/** JSON text: BigInt as an integer, non-finite numbers as strings, every double so that it reads back exactly. */
function toJson(v) {
  if (typeof v === 'bigint') return v.toString();
  if (typeof v === 'number' && Number.isNaN(v)) return '"nan"';
  if (v === Infinity || v === -Infinity) return v > 0 ? '"inf"' : '"-inf"';
  if (Object.is(v, -0)) return '-0.0';
  if (Array.isArray(v)) return `[${v.map(toJson).join(', ')}]`;
  if (v !== null && typeof v === 'object') {
    return `{${Object.entries(v).map(([key, value]) => `${JSON.stringify(key)}: ${toJson(value)}`).join(', ')}}`;
  }
  return JSON.stringify(v);
}

if (require.main === module) {
  const documents = process.argv.slice(2).map((file) => document(readCurve(fs.readFileSync(file, 'utf8'))));
  process.stdout.write(`${toJson(documents)}\n`);
} else {
  module.exports = { document, readCurve, nearestDouble, exactSum, roundHalfEven, poissonLimits, median, Window, toJson };
}
