//! Drawing: panels one above the other, as SVG and as PNG.

use anyhow::{Context as _, anyhow};
use plotters::{
    coord::Shift,
    prelude::*,
    style::{
        FontStyle, register_font,
        text_anchor::{HPos, Pos, VPos},
    },
};

/// The name under which the built-in font is registered; a browser takes its own sans-serif for the SVG.
const FONT: &str = "sans-serif";
/// Colours that people with any kind of colour vision tell apart (Okabe and Ito).
const PALETTE: [RGBColor; 7] = [
    RGBColor(120, 120, 120),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const WIDTH: u32 = 960;

/// What is drawn.
#[derive(Debug)]
pub(crate) struct Sheet {
    pub(crate) title: String,
    pub(crate) panels: Vec<Panel>,
}

/// A diagram.
#[derive(Debug, Default)]
pub(crate) struct Panel {
    pub(crate) x_name: String,
    pub(crate) y_name: String,
    /// px.
    pub(crate) height: u32,
    pub(crate) x_range: Option<(f64, f64)>,
    /// Least end of the upper axis.
    pub(crate) y_least: f64,
    pub(crate) curves: Vec<Line>,
    pub(crate) bars: Vec<Bar>,
    /// Upright lines with a word.
    pub(crate) marks: Vec<Mark>,
    /// Spans in which there is load.
    pub(crate) spans: Vec<(f64, f64)>,
}

/// A curve.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) colour: usize,
    pub(crate) points: Vec<(f64, f64)>,
    /// It jumps instead of sloping.
    pub(crate) is_stairs: bool,
}

/// A bar with its name beneath; several may be of one group.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) colour: usize,
    pub(crate) value: f64,
}

/// An upright line.
#[derive(Debug)]
pub(crate) struct Mark {
    pub(crate) at: f64,
    pub(crate) words: String,
    pub(crate) colour: usize,
}

/// A drawn sheet.
#[derive(Debug)]
pub(crate) struct Picture {
    pub(crate) title: String,
    pub(crate) svg: String,
    pub(crate) png: Vec<u8>,
}

impl Sheet {
    /// Draws it twice.
    pub(crate) fn draw(self) -> anyhow::Result<Picture> {
        register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
            .map_err(|_| anyhow!("the font is broken"))?;
        let height = self.panels.iter().map(|panel| panel.height).sum::<u32>() + 40;
        let size = (WIDTH, height);
        let mut svg = String::new();
        self.draw_on(&SVGBackend::with_string(&mut svg, size).into_drawing_area())?;
        let mut pixels = vec![0; usize::try_from(WIDTH * height * 3)?];
        self.draw_on(&BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area())?;
        Ok(Picture { title: self.title, svg, png: png(&pixels, size)? })
    }

    fn draw_on<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> anyhow::Result<()> {
        self.try_draw(area).map_err(|error| anyhow!("{:?}: {error:?}", self.title))
    }

    fn try_draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        area.fill(&WHITE)?;
        area.draw_text(&self.title, &(FONT, 19).into_text_style(area), (16, 12))?;
        let (_, mut rest) = area.split_vertically(36);
        for panel in &self.panels {
            let (upper, lower) = rest.split_vertically(panel.height);
            panel.draw(&upper)?;
            rest = lower;
        }
        area.present()
    }
}

impl Panel {
    fn draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let mut chart = ChartBuilder::on(area);
        chart.margin(8).margin_right(16).set_label_area_size(LabelAreaPosition::Left, 64);
        chart.set_label_area_size(LabelAreaPosition::Bottom, 40);
        let top = self.top();
        let (x_begin, x_end) = self.x_range();
        let mut chart = chart.build_cartesian_2d(x_begin..x_end, 0.0..top)?;
        let spans = self
            .spans
            .iter()
            .map(|(from, to)| Rectangle::new([(*from, 0.0), (*to, top)], BLACK.mix(0.05).filled()));
        chart.draw_series(spans)?;
        let name_of_bar = |x: &f64| {
            let bar = self.bars.get(index(*x)).filter(|_| (x.fract() - 0.5).abs() < 0.01);
            bar.map_or(String::new(), |bar| bar.name.clone())
        };
        let plain = |x: &f64| if x_end - x_begin < 5.0 { format!("{x:.1}") } else { format!("{x:.0}") };
        let plain_y = |y: &f64| if top < 5.0 { format!("{y:.1}") } else { format!("{y:.0}") };
        let mut mesh = chart.configure_mesh();
        mesh.light_line_style(TRANSPARENT).bold_line_style(BLACK.mix(0.12)).axis_style(BLACK.mix(0.5));
        mesh.label_style((FONT, 13)).axis_desc_style((FONT, 14)).x_desc(&self.x_name).y_desc(&self.y_name);
        mesh.y_label_formatter(&plain_y);
        if self.bars.is_empty() {
            mesh.x_label_formatter(&plain).y_labels(6).draw()?;
        } else {
            mesh.disable_x_mesh().x_labels(0).x_label_formatter(&name_of_bar).y_labels(6).draw()?;
        }
        self.draw_bars(&mut chart, area)?;
        for line in &self.curves {
            let style = colour(line.colour).stroke_width(2);
            let points = if line.is_stairs { stairs(&line.points) } else { line.points.clone() };
            let series = chart.draw_series(LineSeries::new(points, style))?;
            if line.name.is_empty() {
                continue;
            }
            series.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        for (index, mark) in self.marks.iter().enumerate() {
            let style = colour(mark.colour).stroke_width(1);
            chart.draw_series(std::iter::once(PathElement::new([(mark.at, 0.0), (mark.at, top)], style)))?;
            // One beneath the other: they may be near to each other.
            #[expect(clippy::cast_precision_loss, reason = "a handful")]
            let y = top * (0.97 - 0.045 * (index % 8) as f64);
            let ink = colour(mark.colour);
            let text = (FONT, 13).into_text_style(area).color(&ink);
            let is_late = mark.at > x_begin + (x_end - x_begin) * 0.75;
            let side = if is_late { HPos::Right } else { HPos::Left };
            let at = mark.at + (x_end - x_begin) * if is_late { -0.004 } else { 0.004 };
            let text = text.pos(Pos::new(side, VPos::Center));
            chart.draw_series(std::iter::once(Text::new(mark.words.clone(), (at, y), text)))?;
        }
        if self.curves.iter().any(|line| !line.name.is_empty()) {
            let mut labels = chart.configure_series_labels();
            labels.position(SeriesLabelPosition::LowerRight).label_font((FONT, 13));
            labels.background_style(WHITE.mix(0.85)).border_style(BLACK.mix(0.2)).draw()?;
        }
        Ok(())
    }

    fn draw_bars<B: DrawingBackend>(
        &self,
        chart: &mut ChartContext<
            '_,
            B,
            Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
        >,
        area: &DrawingArea<B, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let mut left = 0.0;
        for bar in &self.bars {
            let shape = Rectangle::new(
                [(left + 0.15, 0.0), (left + 0.85, bar.value)],
                colour(bar.colour).mix(0.8).filled(),
            );
            chart.draw_series(std::iter::once(shape))?;
            let text = (FONT, 13).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Bottom));
            let words = format!("{:.1}", bar.value);
            chart.draw_series(std::iter::once(Text::new(words, (left + 0.5, bar.value), text)))?;
            let text = (FONT, 12).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
            let (x, y) = chart.backend_coord(&(left + 0.5, 0.0));
            let (x0, y0) = area.get_base_pixel();
            area.draw_text(&bar.name, &text, (x - x0, y - y0 + 6))?;
            left += 1.0;
        }
        Ok(())
    }

    fn top(&self) -> f64 {
        let curves = self.curves.iter().flat_map(|line| &line.points).map(|(_, y)| *y);
        let most = curves.chain(self.bars.iter().map(|bar| bar.value)).fold(self.y_least, f64::max);
        // Room for the words of the marks above the curves.
        let room = if self.marks.is_empty() { 1.12 } else { 1.5 };
        if most > 0.0 { most * room } else { 1.0 }
    }

    fn x_range(&self) -> (f64, f64) {
        if !self.bars.is_empty() {
            #[expect(clippy::cast_precision_loss, reason = "a handful")]
            return (0.0, self.bars.len() as f64);
        }
        self.x_range.unwrap_or_else(|| {
            let ends = self.curves.iter().flat_map(|line| &line.points).map(|(x, _)| *x);
            (0.0, ends.fold(1.0, f64::max))
        })
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the number of a bar")]
fn index(x: f64) -> usize {
    x.max(0.0) as usize
}

fn colour(number: usize) -> RGBColor {
    PALETTE[number % PALETTE.len()]
}

fn stairs(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut all = Vec::with_capacity(points.len() * 2);
    for (x, y) in points {
        if let Some((_, before)) = all.last().copied() {
            all.push((*x, before));
        }
        all.push((*x, *y));
    }
    all
}

fn png(pixels: &[u8], (width, height): (u32, u32)) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(pixels).context("PNG")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_is_drawn_as_svg_and_png() {
        let curve =
            Line { name: "p50".into(), colour: 1, points: vec![(0.0, 1.0), (2.0, 3.0)], is_stairs: true };
        let mark = Mark { at: 1.0, words: "breach".into(), colour: 2 };
        let lines = Panel { height: 200, curves: vec![curve], marks: vec![mark], ..Panel::default() };
        let bar = Bar { name: "nginx".into(), colour: 0, value: 2.0 };
        let bars = Panel { height: 200, bars: vec![bar], ..Panel::default() };
        let picture = Sheet { title: "Time < space".into(), panels: vec![lines, bars] }.draw().unwrap();
        assert!(
            picture.svg.starts_with("<svg")
                && picture.svg.contains("breach")
                && picture.svg.contains("nginx")
        );
        assert!(picture.svg.contains("Time &lt; space"));
        assert!(picture.png.starts_with(b"\x89PNG"));
    }

    #[test]
    fn stairs_keep_their_height_until_the_next_step() {
        assert_eq!(stairs(&[(0.0, 1.0), (2.0, 3.0)]), [(0.0, 1.0), (2.0, 1.0), (2.0, 3.0)]);
    }
}
