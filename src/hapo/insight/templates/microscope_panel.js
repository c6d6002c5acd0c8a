// The numbers of one token, and what differs between two methods.

let panelled = -1;

function panel(i) {
  panelled = i;
  const { rollout } = state;
  const r = responseAt(i);
  const code = el("code", { dir: "auto" }, ...marked(rollout.text(i), rollout.id(i)));
  const facts = `token ${rollout.position[i]} of ${r.label} · id ${rollout.id(i)} · step ${r.step}`;
  part("token").replaceChildren(
    el("p", { cls: "mx-token" }, code),
    el("p", { cls: "mx-facts", text: facts }),
    el("p", { cls: "mx-said", text: sentence(i) }),
    ...methodsShown().map((m) => ruler(i, m)),
    el("table", {}, el("tbody", {}, ...rows(i))),
    profile(r),
  );
  drawProfile(r, i);
}

const methodsShown = () => (compares() ? [0, state.view.other] : [0]);

function rows(i) {
  const all = [...QUANTITIES, ...MORE];
  const shared = all.filter((q) => !q.own).flatMap((q) => numbers(q, [0], i));
  const made = all.filter((q) => q.own).flatMap((q) => numbers(q, methodsShown(), i));
  if (!compares()) return [...shared, ...made];
  const heads = names().map((name) => el("th", { scope: "col", text: name }));
  return [...shared, el("tr", {}, el("td"), ...heads), ...made];
}

// A row: a quantity of token i, under each of these methods; none where nobody has it.
function numbers(q, methods, i) {
  const cells = methods.map((m) => state.rollout.column(q.key, m)?.[i]);
  if (cells.every((x) => x === undefined)) return [];
  const texts = cells.map((x) => (q.scale === "marks" ? caseOf(q.key, x) : number(x)));
  const cls = texts.every((text) => text === texts[0]) ? "" : "mx-differs";
  const colSpan = q.own ? 1 : methodsShown().length;
  const title = [q.note, q.unit].filter(Boolean).join(", ");
  return [
    el(
      "tr",
      { cls: q.key === state.key ? "on" : "" },
      el("th", { scope: "row", title, text: q.name }),
      ...texts.map((text, k) =>
        el("td", { text, cls, colSpan, data: { key: q.key, method: q.own ? methods[k] : "" } }),
      ),
    ),
  ];
}

function caseOf(key, x) {
  if (x === undefined) return "–";
  if (key === "kept") return x ? "yes" : "no";
  return x ? (x > 0 ? "above" : "below") : "no";
}

// What the step does with this token, in words.
function sentence(i) {
  const at = (key, m = 0) => state.rollout.column(key, m)?.[i];
  const [push, side, moved] = [at("push"), at("side"), at("moved")];
  const says = [];
  if (!at("kept")) says.push("It is not in the loss.");
  else if (side) {
    const bound = side > 0 ? `above 1 + ${short(at("bound_high"))}` : `below 1 − ${short(at("bound_low"))}`;
    says.push(`Its ratio ${short(at("ratio"))} is ${bound}: clipped, ${push ? "with a bounded push" : "no push"}.`);
  }
  if (push) says.push(`The step ${push > 0 ? "raises" : "lowers"} its log-probability: push ${short(push)}.`);
  const instead = state.rollout.otherText(i);
  if (instead !== undefined) {
    const name = visible(instead, at("other")).map(([text]) => text).join("");
    says.push(`Best other token: ${name}, Q ${short(at("q_other"))} against ${short(at("q"))}.`);
  }
  if (moved) {
    says.push(`Redistribution moved its advantage from ${short(at("advantage"))} to ${short(at("advantage_used"))}.`);
  }
  if (compares()) {
    const other = at("push", state.view.other);
    if (other !== push) says.push(`${names()[1]} would push it by ${short(other)}.`);
  }
  return says.join(" ") || "The step does not push it.";
}

// The ratio on a line, between the bounds that a method gives it.
function ruler(i, m) {
  if (!state.rollout.column("ratio", m)) return el("figure", { cls: "mx-ruler" });
  const on = (method) => {
    const [ratio, low, high] = ["ratio", "bound_low", "bound_high"].map((key) => state.rollout.column(key, method)[i]);
    return [ratio, 1 - low, 1 + high];
  };
  const [ratio, low, high] = on(m);
  if (![ratio, low, high].every(Number.isFinite)) return el("figure", { cls: "mx-ruler" });
  const reach = methodsShown().flatMap(on).filter(Number.isFinite);
  const far = 1.25 * Math.max(...reach.map((x) => Math.abs(x - 1)), 0.05);
  const mark = (cls, from, to = from) => {
    const node = el("i", { cls });
    node.style.left = `${50 + (50 * (from - 1)) / far}%`;
    if (to > from) node.style.width = `${(50 * (to - from)) / far}%`;
    return node;
  };
  const clipped = state.rollout.column("clipped", m)[i];
  const line = el("div", {}, mark("band", low, high), mark("one", 1), mark(clipped ? "dot clipped" : "dot", ratio));
  const name = compares() ? `${run().methods[m]}: ` : "";
  const text = `${name}ratio ${short(ratio)} in ${short(low)} … ${short(high)}`;
  return el("figure", { cls: "mx-ruler" }, line, el("figcaption", { text }));
}

// The response as a profile: a bar a token, the token in focus marked.
function profile(r) {
  const canvas = el("canvas", { cls: "mx-profile", title: "the response; click to go there" });
  canvas.addEventListener("click", (event) => {
    const place = Math.floor((event.offsetX / canvas.clientWidth) * r.length);
    touch(r.start + Math.min(Math.max(place, 0), r.length - 1));
  });
  return el("figure", { cls: "mx-fig" }, el("figcaption", { text: `${viewed()} along ${r.label}` }), canvas);
}

function drawProfile(r, i) {
  const canvas = part("token").querySelector(".mx-profile");
  const [wide, high] = ([canvas.width, canvas.height] = [640, 96]); // the style scales it: no layout is asked for
  const draw = canvas.getContext("2d"), shown = values(), colours = hues();
  const signed = scale.kind !== "sequential";
  const base = signed ? high / 2 : high;
  const bar = wide / r.length;
  for (let k = 0; k < r.length; k++) {
    const step = scale.step(shown[r.start + k]);
    const tall = (step / 10) * base;
    draw.fillStyle = colours[signed ? (step > 0 ? 1 : 2) : 0];
    draw.fillRect(k * bar, base - Math.max(tall, 0), Math.max(bar * 0.9, 1.5), Math.abs(tall));
  }
  draw.fillStyle = getComputedStyle(root).color;
  draw.globalAlpha = 0.25;
  draw.fillRect(0, Math.min(base, high - 2), wide, 2);
  draw.globalAlpha = 1;
  draw.fillRect((i - r.start + 0.5) * bar - 2, 0, 4, high);
}

function viewed() {
  const q = quantity();
  if (!q.own || !compares()) return q.name;
  const [own, other] = names();
  const of = { own, other, difference: `${own} − ${other}` };
  return `${q.name}, ${of[state.view.as]}`;
}

// The tokens with the highest and with the lowest values in the responses listed, `most` of each.
function ends(most) {
  const shown = values();
  const top = [], bottom = [];
  const put = (list, i, before) => {
    if (list.length === most && !before(i, list.at(-1))) return;
    const place = list.findIndex((j) => before(i, j));
    list.splice(place < 0 ? list.length : place, 0, i);
    if (list.length > most) list.pop();
  };
  for (const { start, end } of listed) {
    for (let i = start; i < end; i++) {
      if (!Number.isFinite(shown[i])) continue;
      put(top, i, (a, b) => shown[a] > shown[b]);
      put(bottom, i, (a, b) => shown[a] < shown[b]);
    }
  }
  return [top, bottom];
}

function extremes() {
  const { rollout } = state;
  const shown = values();
  const entry = (i) => {
    const code = el("code", {}, ...marked(rollout.text(i).slice(0, 40), rollout.id(i)));
    const title = responseAt(i).label;
    const on = () => touch(i);
    return el("li", {}, el("button", { type: "button", title, on }, code, el("span", { text: short(shown[i]) })));
  };
  const list = (text, tokens) => el("div", {}, el("h3", { text }), el("ol", {}, ...tokens.map(entry)));
  const [top, bottom] = ends(5);
  part("extremes").hidden = scale.kind === "marks" || !top.length;
  part("extremes").replaceChildren(
    el("figcaption", { text: `${viewed()} in the responses listed` }),
    el("div", { cls: "mx-ends-of" }, list("highest", top), list("lowest", bottom)),
  );
}

// How the two methods differ, in words.
function words() {
  part("words").hidden = !compares();
  if (!compares()) return;
  const { rollout, view } = state;
  const [own, other] = names();
  const say = (of, responses) => {
    const name = `compared ${of} ${view.other} ${responses[0].group}`;
    const count = rollout.once(name, () => compared(rollout, view.other, responses));
    const [up, down, here, there] = ["up", "down", "here", "there"].map((key) => count[key].toLocaleString("en"));
    const all = plural(responses.reduce((n, r) => n + r.length, 0), "token");
    const clips =
      count.here || count.there
        ? `${here} clipped only by ${own}, ${there} only by ${other}`
        : "both clip the same tokens";
    const pushes = `${own} pushes ${up} further up and ${down} further down than ${other}`;
    return el("span", { data: { of, ...count }, text: `Of the ${all} of this ${of}, ${pushes}; ${clips}.` });
  };
  part("words").title = "a push counts that differs by over 10 % of the larger one";
  const group = rollout.groups[responseAt(state.token).group];
  part("words").replaceChildren(say("rollout", rollout.responses), say("group", group));
}
