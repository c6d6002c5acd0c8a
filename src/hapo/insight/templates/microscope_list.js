// Colours, their legend, and the list of responses with a strip for each.

const ORDERS = {
  recorded: ["as recorded", (r) => -r.place],
  push: ["strongest push", (r) => size("push", r)],
  moved: ["most redistributed", (r) => size("moved", r)],
  differs: ["most different", (r) => size("push", r, { as: "difference", other: state.view.other })],
  highest: ["highest value", (r) => mean(values(), r)],
  lowest: ["lowest value", (r) => -mean(values(), r)],
  clipped: ["most clipped", (r) => mean(state.rollout.column("clipped", method()), r)],
  length: ["longest", (r) => r.length],
  reward: ["best reward", (r) => r.reward],
};

function size(key, r, view = { as: "own" }) {
  return mean(state.rollout.shown(key, view), r, Math.abs);
}

function fillChoices() {
  part("quantities").replaceChildren(
    ...QUANTITIES.filter(available).map(({ key, name, note }, i) => {
      const title = i < 9 ? `${note} (key ${i + 1})` : note;
      return el("button", { type: "button", text: name, title, data: { key }, on: () => colourBy(key) });
    }),
  );
  const [own, other] = names();
  const views = { own, other, difference: `${own} − ${other}` };
  part("views").replaceChildren(
    ...Object.entries(views).map(([as, text]) =>
      el("button", { type: "button", text, title: text, data: { as }, on: () => viewAs(as) }),
    ),
  );
  const order = part("sort").value;
  const orders = Object.entries(ORDERS).filter(([key]) => key !== "differs" || compares());
  part("sort").replaceChildren(...orders.map(([value, [text]]) => el("option", { value, text })));
  part("sort").value = order in ORDERS ? order : "recorded";
}

// ---- colours

function paintScale() {
  const q = quantity(), { view, rollout } = state;
  for (const node of part("quantities").children) node.ariaPressed = node.dataset.key === q.key;
  for (const node of part("views").children) node.ariaPressed = node.dataset.as === view.as;
  const difference = Boolean(q.own) && view.as === "difference";
  // One scale for both methods, so that their colours compare.
  const both = q.own && compares() && !difference;
  const columns = () => (both ? [0, view.other].map((m) => rollout.column(q.key, m) ?? []) : [values()]);
  scale = rollout.once(`scale ${q.key} ${difference} ${view.other}`, () => scaleOf(q, columns(), difference));
  part("legend").replaceChildren(...legend(q));
}

function legend(q) {
  const { view, rollout } = state;
  const swatch = (cls, text, sample = "a") =>
    el("span", { cls: "mx-swatch" }, el("i", { cls, text: sample }), text);
  const title = el("span", { cls: "mx-title", text: q.unit ? `${q.name}, ${q.unit}` : q.name, title: q.note });
  const marks = clips() ? [swatch("t hi", "clipped above"), swatch("t lo", "below")] : [];
  if (view.as === "difference") marks.push(swatch("t there", `only by ${names()[1]}`));
  if (rollout.column("kept", method()).includes(0)) marks.push(swatch("t out", "not in the loss"));
  if (scale.kind === "marks") {
    const cases = scale.difference ? names().map((name) => `only ${name}`) : MARKS[q.key];
    return [title, swatch(hue(7), cases[0], ""), ...(cases[1] ? [swatch(hue(-7), cases[1], "")] : []), ...marks];
  }
  const diverging = scale.kind === "diverging";
  const steps = Array.from({ length: 11 }, (_, i) => (diverging ? 2 * i - 10 : i));
  const ramp = el("span", { cls: "mx-ramp" }, ...steps.map((step) => el("i", { cls: hue(step) })));
  const ends = diverging ? [scale.low, scale.centre, scale.high] : [scale.low, scale.high];
  const numbers = el("span", { cls: "mx-ends" }, ...ends.map((x) => el("span", { text: short(x) })));
  let says = "";
  if (values() === rollout.none) says = "not of this method";
  else if (!q.own && view.as !== "own") says = "the same under every method";
  const remark = says ? [el("span", { cls: "mx-same", text: says })] : [];
  return [title, el("span", { cls: "mx-scale" }, ramp, numbers), ...remark, ...marks];
}

const MARKS = { side: ["above", "below"], kept: ["not in the loss"] };

function hue(step) {
  if (!step) return "t";
  const side = scale.kind === "sequential" ? "s" : step > 0 ? "p" : "n";
  return `t ${side} k${Math.abs(step)}`;
}

// The colours as the theme has them: sequential, above, below.
function hues() {
  return Array.from(part("hues").children, (node) => getComputedStyle(node).backgroundColor);
}

// ---- the list

function fillList() {
  const { rollout } = state;
  const [verdict, search] = [part("verdict").value, part("search").value.toLowerCase()];
  const clipped = rollout.column("clipped", method());
  const fits = (r) =>
    (!verdict || !r.judged || r.right === (verdict === "right")) &&
    (!part("clipped").checked || clipped.subarray(r.start, r.end).includes(1)) &&
    (!search || r.prompt.toLowerCase().includes(search) || rollout.lower(r).includes(search));
  const [, value] = ORDERS[part("sort").value];
  const rank = new Map(rollout.responses.map((r) => [r, value(r)]));
  const groups = rollout.groups
    .map((group) => group.filter(fits).sort((a, b) => rank.get(b) - rank.get(a)))
    .filter((group) => group.length)
    .sort((a, b) => rank.get(b[0]) - rank.get(a[0]));
  listed = groups.flat();
  part("count").textContent = `${listed.length} of ${plural(rollout.responses.length, "response")}`;
  const heads = excerpts(rollout.head.prompts);
  part("list").replaceChildren(...groups.map((group) => groupRows(group, heads[group[0].group])));
  drawStrips();
  extremes();
}

function groupRows(group, head) {
  const all = state.rollout.groups[group[0].group];
  const right = all.filter((r) => r.right).length;
  const share = { text: `${right}/${all.length}`, title: `${right} of ${all.length} right` };
  const tally = all[0].judged ? el("span", { cls: "mx-tally", ...share }) : "";
  const title = el("div", { cls: "mx-prompt-head" }, el("bdi", { text: head }), tally);
  return el("div", { cls: "mx-group" }, title, ...group.map(row));
}

function row(r) {
  return el(
    "button",
    {
      type: "button",
      cls: r.dropped ? "mx-row dropped" : "mx-row",
      tabIndex: -1,
      ariaLabel: described(r, [...rewardOf(r), plural(r.length, "token")]),
      data: { place: r.place },
      on: () => touch(r.start),
    },
    verdictMark(r),
    el("canvas", { data: { place: r.place } }),
    el("span", { cls: "mx-length", text: r.length }),
  );
}

function rewardOf(r) {
  return r.judged ? [`reward ${short(r.reward)}`] : [];
}

function described(r, facts) {
  const verdict = r.judged ? [r.right ? "right" : "wrong"] : [];
  return [r.label, ...verdict, ...facts].join(", ");
}

function verdictMark(r) {
  if (!r.judged) return "";
  const cls = r.right ? "mx-right" : "mx-wrong";
  return el("span", { cls, text: r.right ? "✓" : "✗", title: `reward ${short(r.reward)}` });
}

// The prompts in a line each, without what all of them begin with.
function excerpts(prompts) {
  const first = prompts[0];
  let common = 0;
  while (prompts.length > 1 && common < first.length && prompts.every((p) => p[common] === first[common])) common++;
  common = common > 20 ? first.lastIndexOf(" ", common) + 1 : 0;
  return prompts.map((p) => (common ? "… " : "") + plain(p.slice(common, common + 120)).replaceAll("\n", " "));
}

function drawStrips() {
  const colours = [...hues(), getComputedStyle(root).color], shown = values();
  const longest = Math.max(...state.rollout.responses.map((r) => r.length));
  for (const canvas of part("list").querySelectorAll("canvas")) {
    strip(canvas, state.rollout.responses[canvas.dataset.place], colours, shown, longest);
  }
}

// A response as a strip: of the tokens that fall on a column of pixels, the one farthest from zero.
function strip(canvas, r, colours, shown, longest) {
  const density = window.devicePixelRatio || 1;
  const [wide, high] = ([canvas.width, canvas.height] = [Math.round(132 * density), Math.round(12 * density)]);
  const draw = canvas.getContext("2d");
  const used = Math.max(2, Math.round((wide * r.length) / longest));
  const columns = new Int8Array(used);
  for (let i = 0; i < r.length; i++) {
    const step = scale.step(shown[r.start + i]);
    const from = Math.floor((i * used) / r.length);
    const to = Math.max(Math.floor(((i + 1) * used) / r.length), from + 1);
    for (let x = from; x < to; x++) if (Math.abs(step) > Math.abs(columns[x])) columns[x] = step;
  }
  draw.fillStyle = colours[3];
  draw.globalAlpha = 0.12;
  draw.fillRect(0, 0, used, high);
  columns.forEach((step, x) => {
    if (!step) return;
    draw.fillStyle = colours[scale.kind === "sequential" ? 0 : step > 0 ? 1 : 2];
    draw.globalAlpha = Math.abs(step) / 10;
    draw.fillRect(x, 0, 1, high);
  });
}
