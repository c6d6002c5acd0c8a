// What is open and in focus, keys, and the address. Text of a run only ever goes through textContent.

const root = document.getElementById("microscope");
const part = (name) => document.getElementById(`mx-${name}`);
const state = {
  run: 0, // place in the index
  first: 0, // first step of the rollout batch
  data: "", // name of its data
  rollout: null,
  key: "entropy", // the quantity that gives the colour
  view: { as: "own", other: 1 }, // own, other or difference; place of the other method
  single: false, // one response, or the group
  token: -1, // in focus
};
let scale, listed = []; // the colour scale; the responses that pass the filter, in order

function el(tag, { cls = "", text, data, on, ...props } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.className = cls;
  if (text !== undefined) node.textContent = text;
  Object.assign(node.dataset, data);
  if (on) node.addEventListener("click", on);
  node.append(...children);
  return node;
}

const run = () => index[state.run];
const names = () => [run().methods[0], run().methods[state.view.other]];
const compares = () => run().methods.length > 1;
const method = () => (state.view.as === "other" ? state.view.other : 0);
const quantity = () => QUANTITIES.find((q) => q.key === state.key);
const clips = () => run().methods.some((_, m) => state.rollout.column("side", m)); // an agent's method does not
const available = (q) => run().methods.some((_, m) => state.rollout.column(q.key, m));
const values = () => state.rollout.shown(state.key, quantity().own ? state.view : { as: "own" });
const responseAt = (i) => state.rollout.responses.find((r) => i >= r.start && i < r.end);
const plural = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

// ---- what is open

// Open a rollout batch of a run, the first one unless told; say whether the response asked for is there.
async function open(place, first, { response, step, position = 0 } = {}) {
  const { rollouts, methods } = index[place];
  const entry = rollouts.find((e) => e.rollout === first) ?? rollouts[0];
  const rollout = entry.data === state.data ? state.rollout : await Rollout.open(entry.data);
  Object.assign(state, { run: place, first: entry.rollout, data: entry.data, rollout });
  if (state.view.other >= methods.length) state.view = { as: "own", other: 1 };
  if (!available(quantity())) state.key = "entropy";
  fillBar(entry);
  fillChoices();
  const wanted = rollout.responses.filter((r) => r.response === response);
  const chosen = wanted.find((r) => r.step === step) ?? wanted[0];
  state.token = chosen ? rollout.at(chosen, position) : -1;
  paintScale();
  fillList();
  select(chosen ? state.token : (listed[0] ?? rollout.responses[0]).start, { render: true });
  return chosen !== undefined || response === undefined;
}

function fillBar(entry) {
  const { rollouts, left, methods, command, asked } = run();
  const options = (name, texts, chosen) => {
    part(name).replaceChildren(...texts.map((text) => el("option", { text })));
    part(name).selectedIndex = chosen;
  };
  options("run", index.map((r) => plain(r.name)), state.run);
  options("rollout", rollouts.map((e) => e.rollout), rollouts.indexOf(entry));
  options("other", methods.slice(1), state.view.other - 1);
  part("run").closest("label").hidden = index.length < 2;
  part("clipped").closest("label").hidden = !clips();
  part("views").closest(".mx-field").hidden = !compares();
  part("other").hidden = methods.length < 3;
  part("before").disabled = entry === rollouts[0];
  part("after").disabled = entry === rollouts.at(-1);
  const notes = [];
  if (left.length) {
    const count = plural(left.length, "recorded rollout");
    notes.push(`${count} left out, at ${few(left)}. To see one: ${command} ${left[0]}`);
  }
  if (entry.responses < entry.recorded) {
    const chosen = asked ? "those asked for" : "by the most mixed, the best and the worst prompt first, then by lot";
    notes.push(
      `Of ${entry.recorded} recorded responses of this rollout batch the page holds ${entry.responses}, ${chosen}. ` +
        `Others are of ${plural(entry.left.length, "prompt")}: ${few(entry.left)}. ` +
        `To see one: ${command} ${entry.rollout} --prompts ${entry.left[0]}`,
    );
  }
  if (!entry.complete) {
    notes.push(
      "The run recorded a part of this rollout batch. Push and other methods are computed over that part, " +
        "so they differ from what training did.",
    );
  }
  note(notes);
}

function few(steps) {
  return steps.length < 8 ? steps.join(", ") : `${steps.slice(0, 5).join(", ")}, … ${steps.at(-1)}`;
}

function note(lines) {
  part("note").hidden = !lines.length;
  part("note").replaceChildren(...lines.map((line) => el("span", { text: plain(line) })));
}

async function beside(by) {
  const { rollouts } = run();
  const next = rollouts[rollouts.findIndex((e) => e.rollout === state.first) + by];
  if (!next) return;
  await open(state.run, next.rollout);
  touch(state.token);
}

// ---- how it is shown

function colourBy(key) {
  state.key = key;
  repaint();
}

function viewAs(as) {
  state.view = { ...state.view, as };
  repaint();
}

function repaint() {
  paintScale();
  fillList();
  paint();
  focusRow();
  panel(state.token);
  words();
}

function filter() {
  fillList();
  const current = responseAt(state.token);
  select(listed.includes(current) || !listed.length ? state.token : listed[0].start, { render: true });
}

function single() {
  state.single = !state.single;
  part("single").ariaPressed = state.single;
  select(state.token, { focus: true, render: true });
}

// ---- the token in focus

function select(i, { focus = false, render = false } = {}) {
  const before = part("text").querySelector(".t.on");
  if (before) {
    before.tabIndex = -1;
    before.classList.remove("on");
  }
  const r = responseAt(i);
  state.token = i;
  if (render || !cardOf(r)) fillGroup(r);
  const node = cardOf(r);
  write(node, i);
  for (const other of part("text").querySelectorAll(".mx-card")) other.classList.toggle("on", other === node);
  const span = spans.get(r.place)[i - r.start];
  span.classList.add("on");
  span.tabIndex = 0;
  inside(node.querySelector(".mx-body"), span);
  inside(part("text"), state.single ? span : node);
  if (focus) span.focus({ preventScroll: true });
  focusRow();
  panel(i);
  words();
}

function focusRow() {
  const { place } = responseAt(state.token);
  for (const row of part("list").querySelectorAll(".mx-row")) {
    const on = Number(row.dataset.place) === place;
    row.classList.toggle("on", on);
    row.tabIndex = on ? 0 : -1;
    if (on) inside(part("list"), row);
  }
}

// Scroll a box, and nothing around it, so that a node in it can be seen.
function inside(box, node) {
  const [a, b] = [box.getBoundingClientRect(), node.getBoundingClientRect()];
  if (b.top < a.top) box.scrollTop -= a.top - b.top + 8;
  else if (b.bottom > a.bottom) box.scrollTop += Math.min(b.bottom - a.bottom + 8, b.top - a.top);
}

// A choice of the reader: the address follows it, and the focus, which stays in the list where it is there.
function touch(i, focus = true) {
  const list = part("list").contains(document.activeElement);
  select(i, { focus: focus && !list });
  if (list) part("list").querySelector(".mx-row.on")?.focus({ preventScroll: true });
  const { rollout, first } = state;
  const { response, step } = responseAt(i);
  const place = { run: run().name, rollout: first, response, position: rollout.position[i] };
  if (rollout.repeated) place.step = step;
  history.replaceState(null, "", `#microscope?${new URLSearchParams(place)}`);
  const clipped = rollout.column("clipped", method())[i] ? ", clipped" : "";
  part("said").textContent = `${plain(rollout.text(i))}: ${quantity().name} ${number(values()[i])}${clipped}`;
}

// ---- keys and pointer

const KEYS = {
  ArrowLeft: (r, i) => touch(Math.max(i - 1, r.start)),
  ArrowRight: (r, i) => touch(Math.min(i + 1, r.end - 1)),
  ArrowUp: (r, i) => across(r, i, -1),
  ArrowDown: (r, i) => across(r, i, 1),
  PageUp: (r) => prompt(r, -1),
  PageDown: (r) => prompt(r, 1),
  Home: (r) => touch(r.start),
  End: (r) => touch(r.end - 1),
  n: (r, i) => clippedFrom(i, 1),
  N: (r, i) => clippedFrom(i, -1),
  e: (r, i) => touch(ends(1)[0][0] ?? i),
  E: (r, i) => touch(ends(1)[1][0] ?? i),
  c: () => cycleColour(1),
  C: () => cycleColour(-1),
  m: () => compares() && viewAs({ own: "other", other: "difference", difference: "own" }[state.view.as]),
  "[": () => beside(-1),
  "]": () => beside(1),
  f: () => single(),
  "/": () => part("search").focus(),
  "?": () => part("help").showModal(),
};

const within = (list, place) => list[Math.min(Math.max(place, 0), list.length - 1)];

function across(r, i, by) {
  const to = within(listed, listed.indexOf(r) + by) ?? r;
  touch(Math.min(to.start + (i - r.start), to.end - 1));
}

function prompt(r, by) {
  const groups = [...new Set(listed.map((other) => other.group))];
  const group = within(groups, groups.indexOf(r.group) + by);
  touch((listed.find((other) => other.group === group) ?? r).start);
}

function clippedFrom(i, by) {
  const clipped = state.rollout.column("clipped", method());
  const tokens = listed.flatMap((r) => Array.from({ length: r.length }, (_, k) => r.start + k));
  let place = tokens.indexOf(i) + by;
  while (place >= 0 && place < tokens.length && !clipped[tokens[place]]) place += by;
  touch(tokens[place] ?? i);
}

function cycleColour(by) {
  const all = QUANTITIES.filter(available);
  colourBy(all[(all.indexOf(quantity()) + by + all.length) % all.length].key);
}

root.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=search], select");
  if (!state.rollout || typing || part("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const colour = /^[1-9]$/.test(event.key) && QUANTITIES.filter(available)[event.key - 1];
  const act = colour ? () => colourBy(colour.key) : KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act(responseAt(state.token), state.token);
});

function onToken(type, act) {
  part("text").addEventListener(type, (event) => {
    const i = event.target.closest(".t")?.token;
    if (i !== undefined) act(i);
  });
}
onToken("click", touch);
onToken("pointerover", (i) => i !== panelled && panel(i));
part("text").addEventListener("pointerleave", () => panelled !== state.token && panel(state.token));

async function change(place, first) {
  await open(place, first);
  touch(state.token, false);
}
part("run").addEventListener("change", (event) => change(event.target.selectedIndex));
part("rollout").addEventListener("change", (event) => {
  change(state.run, run().rollouts[event.target.selectedIndex].rollout);
});
part("before").addEventListener("click", () => beside(-1));
part("after").addEventListener("click", () => beside(1));
part("other").addEventListener("change", (event) => {
  state.view.other = event.target.selectedIndex + 1;
  fillChoices();
  repaint();
});
part("single").addEventListener("click", single);
part("keys").addEventListener("click", () => part("help").showModal());
part("close").addEventListener("click", () => part("help").close());
for (const name of ["search", "verdict", "sort", "clipped"]) part(name).addEventListener("input", filter);

// ---- address, theme, start

async function follow() {
  if (!location.hash.startsWith("#microscope?")) return open(0);
  const asked = new URLSearchParams(location.hash.split("?")[1]);
  const get = (key) => (asked.has(key) ? Number(asked.get(key)) : undefined);
  const [first, response] = [get("rollout"), get("response")];
  const prompt = asked.has("prompt") ? ` --prompts ${Number(asked.get("prompt"))}` : "";
  const place = index.findIndex((r) => r.name === asked.get("run"));
  const found = await open(Math.max(place, 0), first, { response, step: get("step"), position: get("position") });
  root.scrollIntoView();
  const { name, rollouts, command } = run();
  if (place < 0) note([`This page has no tokens of the run ${asked.get("run")}.`]);
  else if (first !== undefined && first !== state.first) {
    const steps = few(rollouts.map((e) => e.rollout));
    note([`This page has no rollout ${first} of ${name}, only ${steps}. To see it: ${command} ${first}${prompt}`]);
  } else if (!found) {
    const how = prompt && ` To see its prompt: ${command} ${first}${prompt}`;
    note([`This page has no response ${response} of rollout ${first}.${how}`]);
  }
  else if (response !== undefined) select(state.token, { focus: true });
}

function redraw() {
  if (!state.rollout) return;
  drawStrips();
  drawProfile(responseAt(panelled), panelled);
}

addEventListener("hashchange", () => location.hash.startsWith("#microscope?") && follow());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
root.opened = follow().then(
  () => (root.dataset.ready = Math.round(performance.now())),
  (error) => {
    note([`The microscope does not open in this browser: ${error.message}`]);
    reportError(error);
  },
);
