// The data of the microscope: what the page holds, unpacked, and the quantities that can be read off it.

const index = JSON.parse(document.getElementById("mx-index").textContent);

// Quantities of a token. scale: "sequential" from low to high, "diverging" from a centre, "marks" for a few cases.
// own: made by the method, so that it differs between methods.
const QUANTITIES = [
  { key: "entropy", name: "entropy", unit: "nats", scale: "sequential", zero: true, note: "of the policy at rollout" },
  { key: "signal", name: "signal", scale: "diverging", own: true, note: "the method's number per token; h of HAPO" },
  { key: "temperature", name: "temperature", scale: "sequential", note: "that the token was drawn at" },
  { key: "unmasked", name: "forward pass", scale: "sequential", zero: true, note: "that drew the token, from 0; none where the response had ended" },
  { key: "confidence", name: "confidence", scale: "sequential", zero: true, note: "the model's probability of the token in that pass" },
  { key: "contribution", name: "contribution", unit: "nats", scale: "diverging", note: "of the token to the estimate of the response's log-likelihood, now" },
  { key: "gate", name: "gate", scale: "diverging", centre: 0.5, note: "mean over the gates of a GateRA adapter" },
  { key: "token_reward", name: "token reward", scale: "diverging", note: "what the reward side gave the token" },
  { key: "ratio", name: "ratio", scale: "diverging", centre: 1, own: true, note: "current policy to policy at rollout" },
  { key: "advantage", name: "advantage", scale: "diverging", own: true, note: "before redistribution" },
  { key: "advantage_used", name: "advantage used", scale: "diverging", own: true, note: "after redistribution" },
  { key: "moved", name: "redistributed", scale: "diverging", own: true, note: "advantage used − advantage" },
  { key: "q", name: "Q", scale: "diverging", note: "of the taken token, by the critic that learns" },
  { key: "value", name: "V", scale: "diverging", note: "soft value of the state, by the target critic" },
  { key: "push", name: "push", scale: "diverging", own: true, note: "how strongly the step raises (+) or lowers log p" },
  { key: "bound_low", name: "lower bound", scale: "sequential", own: true, note: "the ratio may fall to 1 − this" },
  { key: "bound_high", name: "upper bound", scale: "sequential", own: true, note: "the ratio may rise to 1 + this" },
  { key: "side", name: "clipped", scale: "marks", own: true, note: "a bound took the place of the ratio" },
  { key: "mismatch", name: "mismatch", unit: "nats", scale: "diverging", note: "log p at rollout − log p of the sampler" },
  { key: "kept", name: "kept", scale: "marks", own: true, note: "the token is in the loss" },
  { key: "target_weight", name: "weight", scale: "sequential", zero: true, own: true, note: "of a demonstration's target in the loss" },
  { key: "behind", name: "rank / expected", unit: "log2", scale: "diverging", note: "rank of the target against the rank that the model expects there" },
];

// Channels of attribution in the records: as many as there are, a quantity each.
const ATTRIBUTION = "attribution_";
function addChannels(keys) {
  for (const key of keys.filter((k) => k.startsWith(ATTRIBUTION) && !QUANTITIES.some((q) => q.key === k))) {
    const name = key.slice(ATTRIBUTION.length);
    QUANTITIES.push({ key, name, scale: "diverging", note: "what the token adds to the score, by this channel" });
  }
}

// Rows of the panel beside the quantities above.
const MORE = [
  { key: "target", name: "target of Q", note: "the soft Bellman target y" },
  { key: "q_other", name: "Q, best other", note: "of the best token beside the taken one" },
  { key: "kl", name: "KL to reference", unit: "nats", note: "of the whole distribution at this place" },
  { key: "entropy_new", name: "entropy now", unit: "nats", note: "of the current policy" },
  { key: "logp_old", name: "log p, rollout", unit: "nats", note: "under the policy at rollout" },
  { key: "logp_new", name: "log p, now", unit: "nats", note: "under the current policy, before this step" },
  { key: "logp_sampler", name: "log p, sampler", unit: "nats", note: "under what drew the token" },
  { key: "logp_ref", name: "log p, reference", unit: "nats", note: "under the reference policy" },
  { key: "logp", name: "log p", unit: "nats", note: "of the target, before this step" },
  { key: "rank", name: "rank", note: "1 is the likeliest token; ties count against the target" },
  { key: "expected_rank", name: "expected rank", note: "of a token that the policy draws" },
  { key: "weight", name: "weight", own: true, note: "importance weight: policy at rollout to sampler, capped" },
];

const DERIVED = {
  target_weight: (r, m) => r.column("rank", 0) && r.column("weight", m),
  behind: (r) => combine(r.column("rank", 0), r.column("expected_rank", 0), (rank, expected) => Math.log2(rank / expected)),
  contribution: (r) => r.column("unmasked", 0) && r.column("logp_new", 0), // of a masked-diffusion model
  mismatch: (r) => combine(r.column("logp_old", 0), r.column("logp_sampler", 0), (old, sampler) => old - sampler),
  moved: (r, m) => combine(r.column("advantage_used", m), r.column("advantage", m), (used, before) => used - before),
  side: (r, m) => combine(r.column("clipped", m), r.column("ratio", m), (clipped, ratio) => clipped * (ratio < 1 ? -1 : 1)),
};

function combine(a, b, how) {
  return a && b && Float64Array.from(a, (x, i) => how(x, b[i]));
}

// A rollout batch: responses, prompts, and a column a quantity with a number a token.
class Rollout {
  static async open(name) {
    const packed = atob(document.getElementById(name).textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = packed.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Rollout(await new Response(stream).arrayBuffer());
  }

  constructor(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    this.bytes = new Uint8Array(buffer, 4 + length);
    this.head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    this.made = new Map();
    addChannels(Object.keys(this.head.shared));
    this.word = this.unpack(this.head.word);
    this.position = this.unpack(this.head.position);
    this.none = new Float32Array(this.word.length).fill(NaN);
    const distinct = new Set(this.head.responses.map((r) => r.response));
    this.repeated = distinct.size < this.head.responses.length; // used in several steps
    this.responses = this.head.responses.map((r, place) => ({
      ...r,
      place,
      label: this.repeated ? `response ${r.response}, step ${r.step}` : `response ${r.response}`,
      right: r.verdict > 0,
      judged: r.verdict !== null, // a demonstration is not
      length: r.end - r.start,
      prompt: this.head.prompts[r.group],
    }));
    this.groups = this.head.prompts.map((_, group) => this.responses.filter((r) => r.group === group));
    for (const r of this.responses) {
      r.entropy = mean(this.column("entropy", 0), r);
      r.clipped = mean(this.column("clipped", 0), r);
      r.dropped = !this.column("kept", 0).subarray(r.start, r.end).includes(1);
    }
  }

  unpack([offset, kind, length]) {
    if (kind === "u1") return this.bytes.subarray(offset, offset + length);
    const out = new Uint8Array(4 * length);
    for (let plane = 0; plane < 4; plane++) {
      const start = offset + plane * length;
      for (let i = 0; i < length; i++) out[4 * i + plane] = this.bytes[start + i];
    }
    return new (kind === "f4" ? Float32Array : Uint32Array)(out.buffer);
  }

  // The numbers of a quantity under method m; undefined where neither the run nor the method has it.
  column(key, m) {
    return this.once(`${key} ${m}`, () => {
      const spec = this.head.shared[key] ?? this.head.methods[m][key];
      return DERIVED[key] ? DERIVED[key](this, m) : spec && this.unpack(spec);
    });
  }

  once(name, make) {
    if (!this.made.has(name)) this.made.set(name, make());
    return this.made.get(name);
  }

  // What is shown: a quantity under one method, or under the first minus under another; NaN where there is none.
  shown(key, view) {
    if (view.as !== "difference") return this.column(key, view.as === "other" ? view.other : 0) ?? this.none;
    const of = key === "side" ? "clipped" : key;
    const make = () => combine(this.column(of, 0), this.column(of, view.other), (a, b) => a - b) ?? this.none;
    return this.once(`${of} difference ${view.other}`, make);
  }

  // Text of the best token beside the taken one, where a critic said so.
  otherText(i) {
    const other = this.column("other", 0);
    return other && this.head.others[other[i]];
  }

  // What an environment or a tool said after a token.
  said(i) {
    return this.head.said[i];
  }

  text(i) {
    return this.head.words[this.word[i]][1];
  }

  id(i) {
    return this.head.words[this.word[i]][0];
  }

  // Text of a response, with what was said in it, in lower case, for the search.
  lower(r) {
    const piece = (w, k) => this.head.words[w][1] + (this.said(r.start + k) ?? "");
    r.lower ??= Array.from(this.word.subarray(r.start, r.end), piece).join("").toLowerCase();
    return r.lower;
  }

  at(r, position) {
    for (let i = r.start; i < r.end; i++) if (this.position[i] >= position) return i;
    return r.end - 1;
  }
}

function mean(values, { start, end }, of = (x) => x) {
  if (!values) return NaN;
  let sum = 0;
  for (let i = start; i < end; i++) sum += of(values[i]) || 0;
  return sum / (end - start);
}

// A colour scale over some columns: value -> step from -10 to 10; 99 % of the values lie within its ends.
function scaleOf(quantity, columns, difference) {
  if (quantity.scale === "marks") {
    const step = quantity.key === "kept" && !difference ? (x) => (x ? 0 : 7) : (x) => 7 * Math.sign(x);
    return { kind: "marks", difference, step };
  }
  const finite = new Float64Array(columns.reduce((n, column) => n + column.length, 0));
  let count = 0;
  for (const column of columns) for (const x of column) if (Number.isFinite(x)) finite[count++] = x;
  const ordered = finite.subarray(0, count).sort();
  const at = (share) => ordered[Math.round(share * (count - 1))] ?? 0;
  if (quantity.scale === "sequential" && !difference) {
    const low = quantity.zero ? 0 : at(0.005), high = at(0.995);
    const step = (x) => (high > low ? Math.round(10 * Math.min(1, Math.max(0, (x - low) / (high - low)))) : 0) || 0;
    return { kind: "sequential", low, high, step };
  }
  const centre = difference ? 0 : quantity.centre ?? 0;
  const far = Math.max(at(0.995) - centre, centre - at(0.005)) || Math.max(at(1) - centre, centre - at(0));
  const step = (x) => (far > 0 ? Math.round(10 * Math.min(1, Math.max(-1, (x - centre) / far))) : 0) || 0;
  return { kind: "diverging", low: centre - far, centre, high: centre + far, step };
}

// How method 0 and another push these tokens: [further up, further down, clipped only by 0, only by the other].
function compared(rollout, other, responses) {
  const a = rollout.column("push", 0), b = rollout.column("push", other);
  const c = rollout.column("clipped", 0), d = rollout.column("clipped", other);
  const count = { up: 0, down: 0, here: 0, there: 0 };
  for (const { start, end } of responses) {
    for (let i = start; i < end; i++) {
      const more = a[i] - b[i];
      if (Math.abs(more) > 0.1 * Math.max(Math.abs(a[i]), Math.abs(b[i]))) count[more > 0 ? "up" : "down"]++;
      if (c[i] !== d[i]) count[c[i] ? "here" : "there"]++;
    }
  }
  return count;
}

// Six significant digits, as the records have them.
function number(x) {
  if (x === undefined || Number.isNaN(x)) return "–";
  return String(Number(x.toPrecision(6))).replace("Infinity", "∞");
}

function short(x) {
  return Number.isFinite(x) ? String(Number(x.toPrecision(3))) : "–";
}

// Text as [piece, is it a sign for something invisible].
const HIDDEN = /([\p{C}\p{Zl}\p{Zp}\u00a0])/u;
function visible(text, id) {
  if (text === "" || /^\ufffd+$/.test(text)) return [[`⟨${id}⟩`, true]];
  if (/^ +$/.test(text)) return [["␣".repeat(text.length), true]];
  if (!HIDDEN.test(text) || /^\p{Emoji}[\p{Emoji}\u200d\ufe0f]*$/u.test(text)) return [[text, false]];
  return text.split(HIDDEN).filter(Boolean).map((piece) => (HIDDEN.test(piece) ? [sign(piece), true] : [piece, false]));
}

function sign(character) {
  const code = character.codePointAt(0);
  if (character === "\n") return "↵\n";
  if (character === "\t") return "⇥\t";
  if (code < 0x20) return String.fromCharCode(0x2400 + code);
  return code === 0x7f ? "␡" : code === 0xa0 ? "⍽" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}
