const themes = JSON.parse(document.getElementById("themes").textContent);
const figures = [...document.querySelectorAll("figure:has(> .plot)")];
const waiting = new Set(figures);
const views = new Map();

async function draw(figure) {
  waiting.delete(figure);
  views.get(figure)?.finalize();
  const { theme } = document.documentElement.dataset;
  views.set(figure, await vegaEmbed(
    figure.querySelector(".plot"),
    JSON.parse(figure.querySelector("script").textContent),
    {
      ast: true, // the policy of the page forbids eval
      renderer: "svg",
      config: themes[theme],
      tooltip: { theme },
      actions: { export: true, source: false, compiled: false, editor: false },
      downloadFileName: figure.id,
      scaleFactor: 3,
    },
  ));
}

// Those in sight first, the others one after another, so that the page stays at the reader's service.
const near = new IntersectionObserver(
  (entries) => entries.forEach(({ isIntersecting, target }) => isIntersecting && waiting.has(target) && draw(target)),
  { rootMargin: "600px" },
);
async function drawRest() {
  const [next] = waiting;
  if (!next) return;
  await draw(next);
  setTimeout(drawRest);
}

figures.forEach((figure) => near.observe(figure));
setTimeout(drawRest, 300);
addEventListener("themechange", () => {
  figures.forEach((figure) => waiting.add(figure));
  drawRest();
});
addEventListener("beforeprint", () => [...waiting].forEach(draw));
