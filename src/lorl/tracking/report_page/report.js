"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = [...document.querySelectorAll(".chart")];
for (const chart of charts) {
  const { data, layout } = figures[Number(chart.dataset.figure)];
  Plotly.newPlot(chart, data, layout, { responsive: true, displayModeBar: false });
}

// On paper a chart is as wide as its column, whatever it was on the screen: let its drawing scale.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const chart of charts) {
    for (const svg of chart.querySelectorAll(".main-svg")) {
      const [width, height] = [svg.getAttribute("width"), svg.getAttribute("height")];
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.parentElement.style.aspectRatio = `${width} / ${height}`;
    }
  }
});
addEventListener("afterprint", () => {
  for (const chart of charts) {
    for (const svg of chart.querySelectorAll(".main-svg")) svg.removeAttribute("viewBox");
  }
});
