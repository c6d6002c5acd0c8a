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

// One figure at a time, so that the page stays at the reader's service: those in sight first, the others when the
// microscope is open.
const inSight = new Set();
let drawing = false, all = false;
async function drawWaiting() {
  if (drawing) return;
  drawing = true;
  for (let next; (next = [...waiting].find((figure) => inSight.has(figure)) ?? (all && [...waiting][0])); ) {
    await draw(next).catch(reportError);
    await new Promise((then) => setTimeout(then));
  }
  drawing = false;
}

const sight = new IntersectionObserver(
  (entries) => {
    entries.forEach(({ isIntersecting, target }) => inSight[isIntersecting ? "add" : "delete"](target));
    drawWaiting();
  },
  { rootMargin: "300px" },
);
figures.forEach((figure) => sight.observe(figure));
const drawAll = () => setTimeout(() => { all = true; drawWaiting(); }, 300);
Promise.resolve(document.getElementById("microscope")?.opened).then(drawAll, drawAll);
addEventListener("themechange", () => {
  figures.forEach((figure) => waiting.add(figure));
  drawWaiting();
});
addEventListener("beforeprint", () => [...waiting].forEach(draw));
