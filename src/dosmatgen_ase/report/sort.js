document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), place = head.cellIndex
  const up = head.getAttribute("aria-sort") !== "ascending"
  const key = row => { const cell = row.cells[place], value = cell.dataset.value
    return value === undefined ? cell.textContent : value === "" ? Infinity : Number(value) }
  const order = (a, b) => a === b ? 0 : (a < b ? -1 : 1)
  const rows = [...table.tBodies[0].rows].sort((a, b) => key(b) === Infinity || key(a) === Infinity
    ? order(key(a), key(b)) : (up ? 1 : -1) * order(key(a), key(b)))
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"))
  head.setAttribute("aria-sort", up ? "ascending" : "descending")
  table.tBodies[0].append(...rows)
}))
