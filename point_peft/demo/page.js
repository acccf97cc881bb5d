// Swapping, colouring and turning need no server: the answers of all tasks are in the page already.
(() => {
  const DISTANCE = /*distance*/2;

  const chosen = (id) => document.querySelector(`#pp-${id} input:checked`)?.value;
  const angle = (id) => (Number(document.querySelector(`#pp-${id} input[type=range]`).value) * Math.PI) / 180;

  function show(side, task, view) {
    for (const panel of document.querySelectorAll(`[data-side="${side}"][data-task]`)) {
      panel.hidden = panel.dataset.task !== task;
    }
    const plot = document.querySelector(`#pp-cloud-${side} .js-plotly-plot`);
    if (!plot?.data) return;
    const visible = plot.data.map(({ meta }) => meta.task === task && meta.view === view);
    const { caption, cube } = plot.data[visible.indexOf(true)].meta;
    const [x, y, z] = cube;
    window.Plotly.update(plot, { visible }, { "scene.xaxis.range": x, "scene.yaxis.range": y, "scene.zaxis.range": z });
    document.querySelector(`[data-caption="${side}"]`).innerHTML = caption;
  }

  function turn() {
    const around = angle("turn"), up = angle("tilt");
    const eye = {
      x: DISTANCE * Math.cos(up) * Math.cos(around),
      y: DISTANCE * Math.cos(up) * Math.sin(around),
      z: DISTANCE * Math.sin(up),
    };
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      window.Plotly.relayout(plot, { "scene.camera.eye": eye, "scene.camera.up": { x: 0, y: 0, z: 1 } });
    }
  }

  document.addEventListener("change", ({ target }) => {
    if (target.closest("#pp-adapter, #pp-view")) {
      show("a", chosen("adapter"), chosen("view"));
      show("b", chosen("other"), chosen("view"));
    }
  });
  document.addEventListener("input", ({ target }) => {
    // In the number beside a slider stands what the slider is about to have.
    if (target.closest("#pp-turn, #pp-tilt")) requestAnimationFrame(turn);
  });

  // Gradio gives each radio button a group of its own, and the groups no name: arrow keys would not move in them.
  new MutationObserver(() => {
    for (const group of document.querySelectorAll("fieldset[id^=pp-]")) {
      group.setAttribute("role", "radiogroup");
      group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]").textContent);
      for (const radio of group.querySelectorAll("input[type=radio]")) if (radio.name !== group.id) radio.name = group.id;
    }
  }).observe(document, { childList: true, subtree: true });
})();
