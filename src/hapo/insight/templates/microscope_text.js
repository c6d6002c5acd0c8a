// The responses of a group as texts: a card each, a span a token.

const spans = new Map(); // place of a response -> its spans, as far as it is written
const PIECE = 1000; // tokens that are written at once
const watcher = new IntersectionObserver(
  (entries) => entries.forEach((entry) => entry.isIntersecting && write(entry.target)),
  { rootMargin: "300px", scrollMargin: "300px" },
);

function fillGroup(chosen) {
  let group = listed.filter((r) => r.group === chosen.group);
  if (state.single) group = [chosen];
  else if (!group.includes(chosen)) group.unshift(chosen);
  const cards = group.map(card);
  const body = el("div", { cls: "mx-body", dir: "auto" }, ...marked(chosen.prompt, 0));
  const open = chosen.prompt.length < 400;
  const prompt = el("details", { cls: "mx-prompt", open }, el("summary", { text: "prompt" }), body);
  watcher.disconnect();
  spans.clear();
  part("text").replaceChildren(prompt, el("div", { cls: state.single ? "mx-cards mx-one" : "mx-cards" }, ...cards));
  part("text").scrollTop = 0;
  cards.forEach((node) => watcher.observe(node));
}

function card(r) {
  const facts = [
    ...rewardOf(r),
    plural(r.length, "token"),
    `entropy ${short(r.entropy)}`,
    ...(clips() ? [`clipped ${short(100 * r.clipped)} %`] : []),
  ];
  if (r.dropped) facts.push("not in the loss");
  const head = [verdictMark(r), el("b", { text: r.label }), ...facts.map((text) => el("span", { text }))];
  return el(
    "article",
    { cls: "mx-card", data: { place: r.place }, ariaLabel: described(r, facts) },
    el("header", {}, ...head),
    el("div", { cls: "mx-body", dir: "auto" }),
  );
}

const cardOf = (r) => part("text").querySelector(`[data-place="${r.place}"]`);

// The text of a card, as far as a token at least, and the rest a piece at a time, so that the page stays at the
// reader's service; a card far from the screen has none yet.
function write(node, until = 0) {
  const place = Number(node.dataset.place);
  const { start, end } = state.rollout.responses[place];
  const begun = spans.get(place), nodes = begun ?? [];
  spans.set(place, nodes);
  const next = () => piece(node, nodes, start + nodes.length, end);
  if (!begun) next();
  while (start + nodes.length <= Math.min(until, end - 1)) next();
  const rest = () => {
    if (spans.get(place) !== nodes || start + nodes.length >= end) return; // another group is shown, or all of it
    next();
    setTimeout(rest);
  };
  if (!begun) setTimeout(rest);
}

function piece(node, nodes, from, end) {
  const { rollout } = state;
  const r = rollout.responses[node.dataset.place];
  const body = document.createDocumentFragment();
  const written = [];
  for (let i = from; i < Math.min(from + PIECE, end); i++) {
    if (i > r.start && !rollout.said(i - 1) && rollout.position[i] > rollout.position[i - 1] + 1) {
      body.append(el("i", { cls: "mx-gap", text: " ⋯ ", title: "not written by the model" }));
    }
    const span = el("span", { tabIndex: -1 }, ...marked(rollout.text(i), rollout.id(i)));
    span.token = i;
    written.push(span);
    body.append(span);
    if (rollout.said(i)) body.append(answer(rollout.said(i)));
  }
  nodes.push(...written);
  paint([written]);
  node.querySelector(".mx-body").append(body);
}

// What is not the model's: without a colour, under its own heading.
function answer(text) {
  return el("span", { cls: "mx-else" }, el("b", { text: "not the model's" }), ...marked(text, 0));
}

// Nodes of a text in which what is invisible is a sign.
function marked(text, id) {
  return visible(text, id).map(([piece, hidden]) => (hidden ? el("i", { cls: "w", text: piece }) : piece));
}

function plain(text) {
  return visible(text, 0).map(([piece]) => piece).join("");
}

// Colours and marks of the tokens on the page.
function paint(lists = spans.values()) {
  const { rollout, view } = state;
  const shown = values();
  const side = rollout.column("side", method()) ?? rollout.none;
  const kept = rollout.column("kept", method());
  const there = view.as === "difference" ? rollout.column("side", view.other) ?? rollout.none : rollout.none;
  for (const list of lists) {
    for (const span of list) {
      const i = span.token;
      const marks = [hue(scale.step(shown[i]))];
      if (side[i] && !there[i]) marks.push(side[i] > 0 ? "hi" : "lo");
      if (there[i] && !side[i]) marks.push("there");
      if (!kept[i]) marks.push("out");
      if (i === state.token) marks.push("on");
      span.className = marks.join(" ");
    }
  }
}
