"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (name, more = {}, ...children) => {
    const element = document.createElement(name);
    Object.assign(element, more);
    element.append(...children);
    return element;
  };
  const escaped = (words) => {
    const box = document.createElement("i");
    box.textContent = words;
    return box.innerHTML;
  };

  // Light, dark, or as the system.
  const scheme = document.getElementById("scheme");
  const schemes = ["as the system", "light", "dark"];
  scheme.parentElement.hidden = false;
  scheme.addEventListener("click", () => {
    const next = schemes[(schemes.indexOf(root.dataset.scheme || schemes[0]) + 1) % 3];
    if (next === schemes[0]) delete root.dataset.scheme;
    else root.dataset.scheme = next;
    scheme.textContent = `Colours: ${next}`;
  });

  // Copying; a page from a file may have no clipboard, then the text is selected.
  async function copy(words, button, shown) {
    const label = button.firstChild.textContent;
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(words);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(shown);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy") ? "Copied" : "Selected";
    }
    button.firstChild.textContent = done;
    setTimeout(() => { button.firstChild.textContent = label; }, 1500);
  }
  for (const button of all("button.copy")) {
    button.hidden = false;
    const code = button.previousElementSibling;
    button.addEventListener("click", () => copy(code.textContent, button, code));
  }

  // Tables: a click on a header sorts; numbers by value, words by letters.
  const number = (words) => {
    const found = words.replace(/−/g, "-").replace(/(\d),(?=\d{3})/g, "$1").match(/[-+]?\d+\.?\d*(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  for (const table of all("table.sorts")) {
    const body = table.tBodies[0];
    all("thead th", table).forEach((head, column) => {
      const button = make("button", { type: "button", textContent: head.textContent });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.ariaSort === "ascending";
        const cell = (row) => row.cells[column].textContent.trim();
        const rows = [...body.rows];
        const numeric = rows.every((row) => /^[-+−“]?\d|^–?$/.test(cell(row)));
        const compare = (a, b) => {
          if (!numeric) return cell(a).localeCompare(cell(b));
          const [x, y] = [number(cell(a)), number(cell(b))];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return x - y;
        };
        rows.sort((a, b) => (down ? compare(b, a) : compare(a, b)));
        body.append(...rows);
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        head.ariaSort = down ? "descending" : "ascending";
        for (const other of all("thead button", table)) other.textContent = other.textContent.replace(/ [▲▼]$/, "");
        button.textContent += down ? " ▼" : " ▲";
      });
    });
    const button = make("button", { type: "button", textContent: "Copy" });
    button.append(make("span", { className: "hidden", textContent: ` the table ${table.caption.textContent}` }));
    table.caption.append(button);
    button.addEventListener("click", () => {
      const lines = [...table.rows].map((row) => [...row.cells].map((c) => c.textContent.replace(/ [▲▼]$/, "")).join("\t"));
      copy(lines.join("\n"), button, table);
    });
  }

  // Figures.
  const shown = (value, digits = 3) => {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    let words = size !== 0 && (size < 1e-4 || size >= 1e6) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
    if (size >= 1000) words = Number(value.toPrecision(digits)).toLocaleString("en");
    return words.replace("-", "−");
  };
  const STEPS = 24;
  function step(scale, value) {
    if (!Number.isFinite(value)) return null;
    let { low, high } = scale;
    if (scale.log) [value, low, high] = [value, low, high].map((x) => Math.log(Math.max(x, 1e-12)));
    return Math.floor(Math.min(1, Math.max(0, (value - low) / (high - low))) * STEPS + 0.5);
  }
  const [WIDTH, LEFT, RIGHT, TOP] = [440, 46, 8, 8];
  // The same drawing as gainlens.plots.markup.heat_map.
  function heatMap(values, scale, rows, columns, rowName, columnName, alt) {
    const wide = WIDTH - LEFT - RIGHT;
    const [n, m] = [rows.length, columns.length];
    const [w, h] = [wide / m, Math.max(6, Math.min(28, 300 / n))];
    const bottom = TOP + n * h;
    const paths = {};
    values.forEach((row, r) => {
      const steps = row.map((value) => step(scale, value));
      for (let c = 0, end; c < m; c = end) {
        for (end = c + 1; end < m && steps[end] === steps[c]; end += 1);
        if (steps[c] !== null) (paths[steps[c]] ??= []).push(`M${c} ${r}h${end - c}v1h-${end - c}z`);
      }
    });
    const words = (x, y, label, name, more = "") => `<text x="${x}" y="${y}" class="${name}"${more}>${escaped(label)}</text>`;
    let out = `<g class="cells" transform="translate(${LEFT} ${TOP}) scale(${w} ${h})"><rect class="ground" width="${m}" height="${n}"/>`;
    for (const key of Object.keys(paths).sort((a, b) => a - b)) out += `<path class="${scale.letter}${key}" d="${paths[key].join("")}"/>`;
    out += "</g>";
    const every = (count, most) => Math.max(1, Math.ceil(count / most));
    const down = every(n, Math.max(2, Math.floor((n * h) / 18)));
    for (let r = 0; r < n; r += down) out += words(LEFT - 6, TOP + (r + 0.5) * h + 4, rows[r], "end");
    const longest = Math.max(...columns.map((label) => label.length));
    const across = every(m, Math.max(2, Math.floor(wide / Math.max(26, 8 * longest))));
    for (let c = 0; c < m; c += across) out += words(LEFT + (c + 0.5) * w, bottom + 16, columns[c], "mid");
    out += words(LEFT + wide / 2, bottom + 34, columnName, "mid name");
    const middle = TOP + (n * h) / 2;
    out += words(12, middle, rowName, "mid name", ` transform="rotate(-90 12 ${middle})"`);
    const bar = wide / (STEPS + 1);
    out += '<g class="bar">';
    for (let i = 0; i <= STEPS; i += 1) out += `<path class="${scale.letter}${i}" d="M${LEFT + i * bar} ${bottom + 46}h${bar}v8h-${bar}z"/>`;
    const mid = scale.log ? Math.sqrt(scale.low * scale.high) : (scale.low + scale.high) / 2;
    out += `</g>${words(LEFT, bottom + 68, shown(scale.low), "")}${words(LEFT + wide / 2, bottom + 68, shown(mid), "mid")}`;
    out += words(LEFT + wide, bottom + 68, shown(scale.high), "end") + words(LEFT + wide / 2, bottom + 86, scale.unit, "mid name");
    return `<svg viewBox="0 0 ${WIDTH} ${bottom + 96}" role="img" aria-label="${escaped(alt)}">${out}</svg>`;
  }

  const tip = make("div", { className: "tip", hidden: true });
  tip.setAttribute("aria-hidden", "true");
  function say(figure, words, place) {
    const reading = figure.querySelector(".reading");
    reading.textContent = words;
    if (!place) { tip.hidden = true; return; }
    figure.append(tip);
    tip.textContent = words;
    tip.hidden = false;
    const box = figure.getBoundingClientRect();
    const left = Math.min(place.x - box.left + 12, box.width - tip.offsetWidth);
    tip.style.left = `${Math.max(0, left)}px`;
    const above = place.y - box.top - tip.offsetHeight - 12;
    tip.style.top = `${above < 0 ? place.y - box.top + 18 : above}px`;
  }

  // A drawing that the pointer and the arrow keys read: places says where each value is.
  function readable(figure, view, places, enter) {
    view.classList.add("plot");
    view.tabIndex = 0;
    view.setAttribute("role", "group");
    view.setAttribute("aria-label", `Values of the figure: ${figure.querySelector("figcaption").textContent} Arrow keys move${enter ? ", Enter opens a layer" : ""}.`);
    let at = null;
    const go = (next, pointed) => {
      at = next;
      const { words, x, y } = places.read(at);
      say(figure, words, pointed || { x, y });
    };
    view.addEventListener("pointermove", (event) => {
      const found = places.near(event.clientX, event.clientY);
      if (found === null) leave(); else go(found, { x: event.clientX, y: event.clientY });
    });
    const leave = () => { tip.hidden = true; places.clear(); };
    view.addEventListener("pointerleave", leave);
    view.addEventListener("blur", leave);
    view.addEventListener("focus", () => { if (view.matches(":focus-visible")) go(at ?? places.first); });
    view.addEventListener("click", (event) => {
      const found = places.near(event.clientX, event.clientY);
      if (found === null) return;
      go(found, { x: event.clientX, y: event.clientY });
      if (enter) enter(found);
    });
    view.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { leave(); return; }
      if (event.key === "Enter" && enter && at !== null) { enter(at); return; }
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (event.key in moves) {
        event.preventDefault();
        go(at === null ? places.first : places.move(at, ...moves[event.key]));
      }
    });
  }

  function marks(view) {
    const found = all(".mark", view).filter((mark) => mark.querySelector("title"));
    const words = found.map((mark) => mark.querySelector("title").textContent);
    for (const mark of found) mark.querySelector("title").remove(); // or both would show
    const middle = (mark) => { const b = mark.getBoundingClientRect(); return { x: b.x + b.width / 2, y: b.y + b.height / 2 }; };
    const clear = () => { for (const mark of found) mark.classList.remove("on"); };
    return {
      first: 0,
      clear,
      read(i) { clear(); found[i].classList.add("on"); return { words: words[i], ...middle(found[i]) }; },
      near(x, y) {
        let best = null, least = 40 ** 2;
        found.forEach((mark, i) => {
          const b = mark.getBoundingClientRect();
          const dx = Math.max(b.left - x, 0, x - b.right), dy = Math.max(b.top - y, 0, y - b.bottom);
          if (dx * dx + dy * dy < least) [best, least] = [i, dx * dx + dy * dy];
        });
        return best;
      },
      move: (i, down, right) => (i + down + right + found.length) % found.length,
    };
  }

  function cells(view, data) {
    const group = view.querySelector(".cells");
    const ground = group.querySelector(".ground");
    const [n, m] = [data.rows.length, data.columns.length];
    const clear = () => group.querySelector(".cursor")?.remove();
    return {
      first: [0, 0],
      clear,
      read([r, c]) {
        clear();
        const cursor = document.createElementNS("http://www.w3.org/2000/svg", "rect");
        for (const [key, value] of Object.entries({ class: "cursor", x: c, y: r, width: 1, height: 1, "vector-effect": "non-scaling-stroke" })) cursor.setAttribute(key, value);
        group.append(cursor);
        const b = cursor.getBoundingClientRect();
        const note = data.notes[c] ? ` (${data.notes[c]})` : "";
        const words = `${data.rowName} ${data.rows[r]}, ${data.columnName.replace(/,.*| \(.*/, "")} ${data.columns[c]}${note}: ${shown(data.values[r][c])} (${data.scale.unit})`;
        return { words, x: b.x + b.width / 2, y: b.y + b.height / 2 };
      },
      near(x, y) {
        const b = ground.getBoundingClientRect();
        const [r, c] = [Math.floor(((y - b.top) / b.height) * n), Math.floor(((x - b.left) / b.width) * m)];
        return r < 0 || c < 0 || r >= n || c >= m ? null : [r, c];
      },
      move: ([r, c], down, right) => [Math.min(n - 1, Math.max(0, r + down)), Math.min(m - 1, Math.max(0, c + right))],
    };
  }

  function csvRows(figure) {
    const href = figure.querySelector("a.data").href;
    const text = decodeURIComponent(href.slice(href.indexOf(",") + 1));
    return text.trimEnd().split("\r\n").map((line) => [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^,]*))/g)]
      .map(([, quoted, plain]) => (quoted === undefined ? plain : quoted.replaceAll('""', '"'))));
  }
  const value = (cell) => (cell === "" ? NaN : Number(cell));

  function heatFigure(figure) {
    const config = JSON.parse(figure.dataset.heat);
    const [head, ...lines] = csvRows(figure);
    const labels = config.choices + 1 + config.split;
    const columns = head.slice(labels);
    const first = figure.querySelector(".view");
    const alt = first.querySelector("svg").getAttribute("aria-label");
    const part = config.split ? figure.insertBefore(make("div", { className: "part", hidden: true }), figure.querySelector("figcaption")) : null;
    let chosen = null; // the layer whose heads are open
    const data = (choice, layer) => {
      const own = lines.filter((line) => line.slice(0, config.choices).join("|") === choice);
      const rows = own.filter((line) => !config.split || (layer === undefined ? line[labels - 1] === "all" : line[labels - 2] === layer && line[labels - 1] !== "all"));
      return {
        rows: rows.map((line) => line[layer === undefined ? config.choices : labels - 1]),
        values: rows.map((line) => line.slice(labels).map(value)),
        rowName: layer === undefined ? config.row : config.part, columnName: config.column,
        columns, notes: config.notes, scale: config.scales[choice],
      };
    };
    const draw = (view, found, words, enter) => {
      view.innerHTML = heatMap(found.values, found.scale, found.rows, found.columns, found.rowName, found.columnName, words);
      readable(figure, view, cells(view, found), enter);
    };
    let choice = first.dataset.choice;
    function open(layer) {
      chosen = layer;
      const found = data(choice, layer);
      part.hidden = found.rows.length === 0;
      if (part.hidden) return;
      const layers = data(choice).rows;
      const select = make("select", {}, ...layers.map((name) => make("option", { textContent: name, selected: name === layer })));
      select.addEventListener("change", () => open(select.value));
      const close = make("button", { type: "button", textContent: "Close" });
      close.addEventListener("click", () => { part.hidden = true; chosen = null; figure.querySelector(".view").focus(); });
      const view = make("div", { className: "view" });
      const focused = part.contains(document.activeElement);
      part.replaceChildren(make("p", {}, make("label", {}, `${config.part}s of ${config.row} `, select), close), view);
      if (focused) select.focus();
      draw(view, found, `Heat map: the ${config.part}s of ${config.row} ${layer}.`);
    }
    const show = (next) => {
      choice = next;
      const view = make("div", { className: "view" });
      view.dataset.choice = choice;
      figure.querySelector(".view").replaceWith(view);
      const found = data(choice);
      draw(view, found, alt, part ? ([r]) => open(found.rows[r]) : undefined);
      if (chosen !== null) open(chosen);
    };
    show(choice);
    choices(figure, Object.keys(config.scales), show);
  }

  function chartFigure(figure) {
    const views = all(".view", figure).filter((view) => view.querySelector("svg"));
    for (const view of views) readable(figure, view, marks(view));
    choices(figure, views.map((view) => view.dataset.choice), (next) => {
      for (const view of views) view.hidden = view.dataset.choice !== next;
    });
  }

  // A combination that was not measured gives the nearest one that was.
  function choices(figure, known, show) {
    const box = figure.querySelector(".choices");
    if (!box) return;
    box.hidden = false;
    const selects = all("select", box);
    selects.forEach((select, which) => select.addEventListener("change", () => {
      const wanted = selects.map((s) => s.value);
      const score = (name) => name.split("|").reduce((sum, v, i) => sum + (v === wanted[i]) * (i === which ? 10 : 1), 0);
      const next = known.reduce((best, name) => (score(name) > score(best) ? name : best));
      next.split("|").forEach((v, i) => { selects[i].value = v; });
      show(next);
    }));
  }

  for (const figure of all("figure")) {
    if (!figure.querySelector(".view svg")) continue;
    const reading = figure.querySelector(".reading");
    reading.hidden = false;
    reading.setAttribute("aria-live", "polite");
    if (figure === document.querySelector("figure")) reading.textContent = "Point at a value, or move with Tab and the arrow keys.";
    if (figure.dataset.heat) heatFigure(figure); else chartFigure(figure);
  }
})();
