//! Pictures of a file of JSON lines: throughput bars with their range, scaling curves, latencies, and what happened second by
//! second beside a pinned snapshot. SVG, so no font is needed to draw them.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};
use clap::ValueEnum;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::report::{Measurement, Run, Series, distinct, samples};
use crate::stats;
use crate::systems::SystemName;

const SIZE: (u32, u32) = (960, 540);
/// In the order of `SystemName`.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0, 90, 181),
    RGBColor(220, 50, 32),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 40),
    RGBColor(90, 90, 90),
    RGBColor(148, 103, 189),
    RGBColor(0, 0, 0),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One bar: median and range.
struct Bar {
    label: String,
    colour: RGBColor,
    median: f64,
    range: (f64, f64),
}

struct Curve {
    label: String,
    points: Vec<(f64, f64)>,
}

/// A picture of bars: one for each system and case.
struct Picture {
    scenario: &'static str,
    /// Behind the scenario in the name of the file, where it has several pictures
    suffix: &'static str,
    metric: &'static str,
    title: &'static str,
    /// Only cases with these words
    case: &'static str,
    logarithmic: bool,
}

const fn picture(scenario: &'static str, metric: &'static str, title: &'static str) -> Picture {
    Picture { scenario, suffix: "", metric, title, case: "", logarithmic: false }
}

const PICTURES: [Picture; 15] = [
    picture("throughput-batch", "jobs/s", "throughput-batch: jobs/s, median and range"),
    picture("throughput-single", "jobs/s", "throughput-single: jobs/s, median and range"),
    picture("offered-5k", "jobs/s", "offered-5k: jobs/s, median and range"),
    Picture {
        logarithmic: true,
        ..picture("pickup-latency", "pickup p99 ms", "pickup-latency: enqueue to worker, 99th percentile, ms")
    },
    Picture {
        case: "enqueue + claim + complete",
        ..picture("wal-per-job", "WAL B/job, no page images", "wal-per-job: bytes from enqueue to done, no page images")
    },
    picture("crash-recovery", "kill to the old rate, s", "crash-recovery: seconds from kill -9 to the old rate"),
    Picture { logarithmic: true, ..picture("backlog", "claim p50 us", "backlog: claim of 64 in front of waiting jobs, p50, us") },
    picture("scheduled-backlog", "claim p50 us", "scheduled-backlog: claim of 64 with jobs scheduled ahead, p50, us"),
    Picture {
        logarithmic: true,
        ..picture("long-transaction", "claim p50 us", "long-transaction: claim of 64 behind an open enqueue, p50, us")
    },
    picture("rescue-cost", "jobs/s", "rescue-cost: jobs/s with deadlines and without"),
    Picture {
        logarithmic: true,
        ..picture("wakeup", "commit sent to wait returned, p50 ms", "wakeup: from commit to the worker awake, p50, ms")
    },
    picture("heartbeat", "round trip, ns", "heartbeat: round trip, ns"),
    picture("rebuild", "rows/s", "rebuild: rows/s"),
    Picture {
        suffix: "-dead-tuples",
        logarithmic: true,
        ..picture("pinned-horizon", "dead tuples in tables", "pinned-horizon: dead tuples at the end of each phase")
    },
    Picture {
        suffix: "-disk",
        logarithmic: true,
        ..picture("pinned-horizon", "MB on disk at the end", "pinned-horizon: MB on disk at the end of each phase")
    },
];

/// Draws what the run has data for; the files written.
pub fn draw(run: &Run, into: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(into)?;
    let mut files = Vec::new();
    for picture in &PICTURES {
        let wanted = |m: &&Measurement| m.scenario == picture.scenario && m.case.contains(picture.case);
        let list = by_system(&run.measurements.iter().filter(wanted).collect::<Vec<_>>(), picture.metric);
        if !list.is_empty() {
            let file = into.join(format!("{}{}.svg", picture.scenario, picture.suffix));
            bars(&file, picture.title, &list, picture.logarithmic)?;
            files.push(file);
        }
    }
    for scenario in distinct(run.measurements.iter().map(|m| m.scenario.as_str())) {
        if scenario.starts_with("worker-scaling") {
            let file = into.join(format!("{}.svg", scenario.replace(", ", "-")));
            let of_scenario: Vec<&Measurement> = run.measurements.iter().filter(|m| m.scenario == scenario).collect();
            let title = format!("{scenario}: jobs/s by worker sessions");
            curves(&file, &title, "worker sessions", &scaling(&of_scenario), true)?;
            files.push(file);
        }
    }
    for scenario in ["pinned-horizon", "long-horizon"] {
        let of_scenario: Vec<&Series> = run.series.iter().filter(|series| series.scenario == scenario).collect();
        if !of_scenario.is_empty() {
            let file = into.join(format!("{scenario}.svg"));
            timeline(&file, scenario, &of_scenario)?;
            files.push(file);
        }
    }
    Ok(files)
}

fn by_system(measurements: &[&Measurement], metric: &str) -> Vec<Bar> {
    let systems = distinct(measurements.iter().map(|m| m.system.as_str()));
    let cases = distinct(measurements.iter().map(|m| m.case.as_str()));
    let mut list = Vec::new();
    for case in &cases {
        let of_case: Vec<&Measurement> = measurements.iter().copied().filter(|m| m.case == *case).collect();
        for system in &systems {
            let values = samples(&of_case, system, metric);
            if let (Some(median), Some(range)) = (stats::median(&values), stats::range(&values)) {
                let label = if cases.len() > 1 { format!("{case}: {system}") } else { (*system).to_owned() };
                list.push(Bar { label, colour: colour(system), median, range });
            }
        }
    }
    list
}

/// The number in "batch, 8 sessions".
fn scaling(measurements: &[&Measurement]) -> Vec<Curve> {
    let mut list = Vec::new();
    for system in distinct(measurements.iter().map(|m| m.system.as_str())) {
        let mut points = Vec::new();
        for case in distinct(measurements.iter().map(|m| m.case.as_str())) {
            let of_case: Vec<&Measurement> = measurements.iter().copied().filter(|m| m.case == case).collect();
            let sessions = case.split_whitespace().find_map(|word| word.parse::<f64>().ok());
            if let (Some(sessions), Some(rate)) = (sessions, stats::median(&samples(&of_case, system, "jobs/s"))) {
                points.push((sessions, rate));
            }
        }
        list.push(Curve { label: system.to_owned(), points });
    }
    list
}

/// Horizontal bars: names of systems are long.
fn bars(file: &Path, title: &str, list: &[Bar], logarithmic: bool) -> Result<()> {
    let height = 110 + 26 * u32::try_from(list.len())?;
    let area = SVGBackend::new(file, (SIZE.0, height)).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let most = list.iter().map(|bar| bar.range.1).fold(f64::MIN_POSITIVE, f64::max);
    let least = list.iter().map(|bar| bar.range.0).filter(|value| *value > 0.0).fold(most, f64::min);
    if logarithmic {
        bars_on(&area, title, list, least / 2.0, (least / 2.0..most * 1.3).log_scale())?;
    } else {
        bars_on(&area, title, list, 0.0, 0.0..most * 1.12)?;
    }
    area.present().map_err(failed)
}

fn bars_on<X>(area: &Area<'_>, title: &str, list: &[Bar], foot: f64, x: X) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let rows = list.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(30)
        .set_label_area_size(LabelAreaPosition::Left, 330)
        .set_label_area_size(LabelAreaPosition::Bottom, 34)
        .build_cartesian_2d(x, 0.0..rows)
        .map_err(failed)?;
    let name = |y: &f64| {
        // The grid lies in the middle of the bars.
        let row = (rows - y).floor();
        list.get(row.max(0.0) as usize).map_or(String::new(), |bar| bar.label.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|value| short(*value))
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(failed)?;
    for (row, bar) in list.iter().enumerate() {
        let (top, bottom) = (rows - row as f64 - 0.15, rows - row as f64 - 0.85);
        let middle = (top + bottom) / 2.0;
        let colour = bar.colour;
        // Nought has no logarithm: its bar has no length.
        let (median, range) = (bar.median.max(foot), (bar.range.0.max(foot), bar.range.1.max(foot)));
        chart.draw_series([Rectangle::new([(foot, bottom), (median, top)], colour.mix(0.75).filled())]).map_err(failed)?;
        chart.draw_series(LineSeries::new([(range.0, middle), (range.1, middle)], &BLACK)).map_err(failed)?;
        let (x, y) = chart.backend_coord(&(foot, middle));
        let label = format!("{}: {}", name(&middle), short(bar.median));
        let style = ("sans-serif", 14).into_font().into_text_style(area).pos(right_centre());
        area.draw(&Text::new(label, (x - 8, y), style)).map_err(failed)?;
    }
    Ok(())
}

fn right_centre() -> plotters::style::text_anchor::Pos {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    Pos::new(HPos::Right, VPos::Center)
}

/// Doublings of sessions are steps of equal width.
fn curves(file: &Path, title: &str, x_name: &str, list: &[Curve], logarithmic: bool) -> Result<()> {
    let points = || list.iter().flat_map(|curve| curve.points.iter());
    if points().next().is_none() {
        return Ok(());
    }
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let x = Range {
        start: points().map(|point| point.0).fold(f64::INFINITY, f64::min),
        end: points().map(|point| point.0).fold(2.0, f64::max),
    };
    let y = 0.0..points().map(|point| point.1).fold(1.0, f64::max) * 1.08;
    if logarithmic {
        curves_on(&area, title, x_name, list, x.log_scale().base(2.0), y, &[])?;
    } else {
        curves_on(&area, title, x_name, list, x, y, &[])?;
    }
    area.present().map_err(failed)
}

/// The phases of a system follow each other; all systems have the same.
fn timeline(file: &Path, scenario: &str, series: &[&Series]) -> Result<()> {
    let mut list = Vec::new();
    let mut edges: Vec<(f64, String)> = Vec::new();
    for (number, system) in distinct(series.iter().map(|series| series.system.as_str())).into_iter().enumerate() {
        let mut points = Vec::new();
        for phase in series.iter().filter(|series| series.system == system) {
            if number == 0 {
                edges.push((points.len() as f64, phase.phase.clone()));
            }
            // A second without a completion has no logarithm.
            for rate in &phase.rate {
                points.push((points.len() as f64, rate.max(1.0)));
            }
        }
        list.push(Curve { label: system.to_owned(), points });
    }
    let points = || list.iter().flat_map(|curve| curve.points.iter());
    let end = points().map(|point| point.0).fold(1.0, f64::max);
    let most = points().map(|point| point.1).fold(10.0, f64::max);
    let least = points().map(|point| point.1).fold(most, f64::min);
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let title = format!("{scenario}: completions in each second (logarithmic)");
    curves_on(&area, &title, "seconds", &list, 0.0..end, (least / 1.5..most * 1.5).log_scale(), &edges)?;
    area.present().map_err(failed)
}

fn curves_on<X, Y>(area: &Area<'_>, title: &str, x_name: &str, list: &[Curve], x: X, y: Y, edges: &[(f64, String)]) -> Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .margin_right(30)
        .set_label_area_size(LabelAreaPosition::Left, 70)
        .set_label_area_size(LabelAreaPosition::Bottom, 42)
        .build_cartesian_2d(x, y)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(x_name)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(failed)?;
    for curve in list {
        let colour = colour(&curve.label);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))
            .map_err(failed)?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    let plane = chart.plotting_area().get_pixel_range();
    for (number, (at, phase)) in edges.iter().enumerate() {
        let low = list.iter().flat_map(|curve| curve.points.iter()).map(|point| point.1).next().unwrap_or(1.0);
        let (x, _) = chart.backend_coord(&(*at, low));
        area.draw(&PathElement::new([(x, plane.1.start), (x, plane.1.end)], BLACK.mix(0.4))).map_err(failed)?;
        // A phase may be shorter than its name.
        let y = plane.1.start + 2 + 14 * (number as i32 % 2);
        area.draw(&Text::new(phase.clone(), (x + 4, y), ("sans-serif", 13))).map_err(failed)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(failed)
}

/// The same in every picture; a way to finish jobs is part of the name of a contender.
fn colour(system: &str) -> RGBColor {
    let name = system.split([' ', ',']).next().unwrap_or_default();
    let number = SystemName::value_variants().iter().position(|known| known.as_str() == name);
    number.and_then(|number| COLOURS.get(number % COLOURS.len())).copied().unwrap_or(BLACK)
}

/// 12 k, 3.4 k, 900, 0.12
fn short(value: f64) -> String {
    let value = value + 0.0; // an empty sum is -0
    if value >= 10_000.0 {
        format!("{:.0} k", value / 1_000.0)
    } else if value >= 1_000.0 {
        format!("{:.1} k", value / 1_000.0)
    } else if value >= 10.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_gives_its_pictures() -> Result<()> {
        let mut run = Run::default();
        for (system, rate) in [("awa", 900.0), ("pgmq", 300.0)] {
            run.measurements.push(Measurement::new("throughput-batch", "c", system, 1).metric("jobs/s", rate));
            for sessions in [1, 2, 4] {
                let case = format!("batch, {sessions} sessions");
                run.measurements.push(Measurement::new("worker-scaling, batch", case, system, 1).metric("jobs/s", rate));
            }
            let rate = vec![rate, 0.0, rate];
            let phase = "clean".to_owned();
            let (scenario, system) = ("pinned-horizon".to_owned(), system.to_owned());
            run.series.push(Series { scenario, system, phase, rate, depth: Vec::new() });
        }
        let into = std::env::temp_dir().join(format!("awa_bench_plots_{}", std::process::id()));
        let files = draw(&run, &into)?;
        let texts: Vec<String> = files.iter().map(fs::read_to_string).collect::<Result<_, _>>()?;
        fs::remove_dir_all(&into)?;
        assert_eq!(texts.len(), 3);
        assert!(texts.iter().all(|text| text.contains("<svg") && text.contains("awa") && text.contains("pgmq")));
        Ok(())
    }

    #[test]
    fn labels_are_short() {
        assert_eq!([0.12, 5.0, 900.0, 1_250.0, 42_000.0].map(short), ["0.12", "5", "900", "1.2 k", "42 k"]);
    }
}
