/* What a page gains with a script: the theme's button, tooltips, keys, log and linear, hiding series, sorting tables.
   Text is only ever set as text, never as markup. */
"use strict";
(function () {
  const root = document.documentElement;
  root.classList.add("js");
  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const shape = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return node;
  };

  /* Theme: a file opened from disk may have no storage. */
  const store = {
    get() { try { return localStorage.getItem("saeforge-theme"); } catch (e) { return null; } },
    set(value) { try { localStorage.setItem("saeforge-theme", value); } catch (e) { /* not kept, then */ } },
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = document.querySelector(".theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const labelTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
  if (["dark", "light"].includes(store.get())) root.dataset.theme = store.get();
  labelTheme();
  dark.addEventListener("change", labelTheme);
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store.set(root.dataset.theme);
    labelTheme();
  });

  /* Figures for the tooltip, as the page writes them. */
  const figure = (value) => {
    if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "\u2212");
    const size = Math.abs(value);
    const shown = size >= 1e-4 && size < 1e6
      ? value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 4 })
      : value.toExponential(2).replace("e+", "e");
    return shown.replace("-", "\u2212");
  };
  const at = ([low, high, start, end, log], value) => {
    const f = log ? Math.log : (v) => v;
    return start + ((f(value) - f(low)) / (f(high) - f(low))) * (end - start);
  };

  /* One tooltip for all charts. */
  const tip = make("div", "tip");
  tip.hidden = true;
  const live = make("div", "skip");
  live.setAttribute("aria-live", "polite");
  document.body.append(tip, live);
  const showTip = (svg, px, py, title, rows) => {
    tip.replaceChildren(make("b", "", title));
    for (const [name, value, colour] of rows) {
      const row = make("div");
      const label = make("span", colour === undefined ? "" : `c${colour}`);
      if (colour !== undefined) label.append(make("i"));
      label.append(name);
      row.append(label, make("span", "", value));
      tip.append(row);
    }
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const zoom = box.width / svg.viewBox.baseVal.width;
    const x = box.left + px * zoom, y = box.top + py * zoom;
    const width = tip.offsetWidth, height = tip.offsetHeight, page = root.clientWidth;
    let left = x + 14 + width > page - 8 ? x - 14 - width : x + 14;
    left = Math.max(8, Math.min(left, page - width - 8));
    const top = y - height - 12 < 8 ? y + 14 : y - height - 12;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  };

  const hidden = (chart) => new Set([...chart.querySelectorAll(".plot .series.off")].map((g) => g.dataset.series));

  document.querySelectorAll("figure.chart").forEach((chart) => {
    const content = JSON.parse(chart.querySelector('script[type="application/json"]').textContent);
    chart.querySelectorAll("title").forEach((title) => title.remove()); // the tooltip takes their place

    chart.querySelectorAll(".modes button").forEach((button) => button.addEventListener("click", () => {
      chart.querySelectorAll(".modes button").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      chart.querySelectorAll(".plot").forEach((svg) => { svg.toggleAttribute("hidden", svg.dataset.view !== button.dataset.view); });
      leave();
    }));

    const stops = (svg) => { // what can be pointed at: place, title, rows
      const [x, y] = content.views[svg.dataset.view];
      const off = hidden(chart);
      const fits = (value, scale) => value !== null && !(scale[4] && value <= 0);
      if (content.kind === "lines") {
        const shown = content.series.filter((s) => !off.has(s.name));
        const places = [...new Set(shown.flatMap((s) => content.x[s.x]))].sort((a, b) => a - b);
        return places.map((place) => ({
          px: at(x, place), title: `${figure(place)} ${content.x_label}`,
          rows: () => shown.map((s) => {
            const own = content.x[s.x]; // its nearest point: series need not be measured at the same steps
            let best = 0;
            own.forEach((v, i) => { if (Math.abs(v - place) < Math.abs(own[best] - place)) best = i; });
            return { s, v: s.y[best], x: own[best] };
          }).filter(({ v }) => fits(v, y)),
        }));
      }
      return content.items.filter((item) => !off.has(item.series) && fits(item.y, y)).map((item) => ({
        px: item.x.reduce((sum, v) => sum + at(x, v), 0) / item.x.length, py: at(y, item.y), item,
      }));
    };

    let current = null;
    const show = (svg, list, index) => {
      const [x, y] = content.views[svg.dataset.view];
      const layer = svg.querySelector(".hover");
      const stop = list[index];
      layer.replaceChildren();
      current = { svg, index };
      if (content.kind === "lines") {
        const rows = stop.rows();
        layer.append(shape("line", { x1: stop.px, x2: stop.px, y1: y[2], y2: y[3] }));
        rows.forEach(({ s, v, x: place }) => layer.append(shape("circle", { cx: at(x, place), cy: at(y, v), r: 3.5, class: `c${s.colour}` })));
        const few = rows.length > 14 ? rows.slice(0, 14) : rows;
        const told = few.map(({ s, v }) => [s.name, figure(v), s.colour]);
        if (few.length < rows.length) told.push([`and ${rows.length - few.length} more`, ""]);
        showTip(svg, stop.px, rows.length ? Math.min(...rows.map(({ v }) => at(y, v))) : y[3], stop.title, told);
      } else {
        if (content.kind === "bars") {
          const [a, b] = stop.item.x.map((v) => at(x, v));
          if (content.items.length > 1) layer.append(shape("rect", { x: a, y: stop.py, width: b - a, height: Math.max(0, y[2] - stop.py) }));
        } else layer.append(shape("circle", { cx: stop.px, cy: stop.py, r: 9, class: "ring" }));
        showTip(svg, stop.px, stop.py, stop.item.title, stop.item.rows);
      }
    };
    const leave = () => {
      chart.querySelectorAll(".hover").forEach((layer) => layer.replaceChildren());
      tip.hidden = true;
      current = null;
    };
    const nearest = (list, px, py) => {
      let best = -1, least = Infinity;
      list.forEach((stop, i) => {
        const distance = content.kind === "points" ? Math.hypot(stop.px - px, stop.py - py) : Math.abs(stop.px - px);
        if (distance < least) { best = i; least = distance; }
      });
      return content.kind === "points" && least > 60 ? -1 : best;
    };
    document.addEventListener("pointerdown", (event) => { if (current && !chart.contains(event.target)) leave(); });
    chart.querySelectorAll(".plot").forEach((svg) => {
      const point = (event) => {
        const box = svg.getBoundingClientRect();
        const zoom = svg.viewBox.baseVal.width / box.width;
        const list = stops(svg);
        const index = nearest(list, (event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom);
        if (index < 0) leave(); else show(svg, list, index);
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); }); // a lifted finger leaves, too
      svg.addEventListener("blur", leave);
      svg.addEventListener("keydown", (event) => {
        const list = stops(svg);
        const last = list.length - 1;
        if (last < 0) return;
        const here = current && current.svg === svg ? Math.min(current.index, last) : -1;
        const step = event.shiftKey ? 10 : 1;
        const next = { ArrowRight: Math.min(last, here + step), ArrowLeft: Math.max(0, here - step), Home: 0, End: last }[event.key];
        if (event.key === "Escape") leave();
        if (next === undefined) return;
        event.preventDefault();
        show(svg, list, next);
        live.textContent = [...tip.children].map((row) => [...row.childNodes].map((n) => n.textContent).join(" ")).join("; ");
      });
    });
  });

  /* Legends: a name is shown or hidden in every chart that lies under the legend. */
  document.querySelectorAll(".legend").forEach((legend) => {
    const scope = legend.closest("figure") || legend.closest("section");
    legend.querySelectorAll(".key").forEach((key) => key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", String(on));
      scope.querySelectorAll(".series").forEach((g) => { if (g.dataset.series === key.dataset.series) g.classList.toggle("off", !on); });
    }));
  });

  /* Tables: a click on a head sorts; rows without a figure stay last. */
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
        const rows = [...body.rows];
        const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
        rows.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          return (up ? 1 : -1) * (numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
        });
        body.append(...rows);
      });
    });
  });

  /* On paper nothing is folded. */
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
