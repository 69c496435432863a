# A design with the core for a KV260, from block design to bit file:  vivado -mode batch -source kv260.tcl
# Run package_ip.tcl first. Writes ./out/instantft.bit and ./out/instantft.hwh, which driver.py loads.
# NOT TRIED: written from Vivado's documentation; there was no Vivado and no board to run it.
set here [file normalize [file dirname [info script]]]
set out [file join $here out]
file mkdir $out
create_project -force -part @PART@ instantft [file join $here project]
set boards [get_board_parts -quiet -latest_file_version {*:kv260_som:*}]
if {[llength $boards]} { set_property board_part [lindex $boards 0] [current_project] }
set_property ip_repo_paths [list [file join $here ip]] [current_project]
update_ip_catalog

create_bd_design instantft_bd
set ps [create_bd_cell -type ip -vlnv xilinx.com:ip:zynq_ultra_ps_e ps]
if {[llength $boards]} {
    apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset 1} $ps
}
set_property -dict [list \
    CONFIG.PSU__FPGA_PL0_ENABLE 1 \
    CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ @MHZ@ \
    CONFIG.PSU__USE__M_AXI_GP0 1 CONFIG.PSU__USE__M_AXI_GP1 0 CONFIG.PSU__USE__M_AXI_GP2 0 \
    CONFIG.PSU__USE__S_AXI_GP2 1 CONFIG.PSU__SAXIGP2__DATA_WIDTH 128 \
    CONFIG.PSU__USE__S_AXI_GP3 1 CONFIG.PSU__SAXIGP3__DATA_WIDTH 128] $ps
set core [create_bd_cell -type ip -vlnv instantft:user:instantft instantft_0]
set reset [create_bd_cell -type ip -vlnv xilinx.com:ip:proc_sys_reset reset]
set clock [get_bd_pins ps/pl_clk0]
connect_bd_net [get_bd_pins ps/pl_resetn0] [get_bd_pins reset/ext_reset_in]

foreach {name from to} {
    control ps/M_AXI_HPM0_FPD  instantft_0/s_axi_control
    memory0 instantft_0/m_axi_gmem0 ps/S_AXI_HP0_FPD
    memory1 instantft_0/m_axi_gmem1 ps/S_AXI_HP1_FPD
} {
    set switch [create_bd_cell -type ip -vlnv xilinx.com:ip:smartconnect $name]
    set_property -dict [list CONFIG.NUM_SI 1 CONFIG.NUM_MI 1] $switch
    connect_bd_intf_net [get_bd_intf_pins $from] [get_bd_intf_pins $name/S00_AXI]
    connect_bd_intf_net [get_bd_intf_pins $name/M00_AXI] [get_bd_intf_pins $to]
    connect_bd_net $clock [get_bd_pins $name/aclk]
    connect_bd_net [get_bd_pins reset/peripheral_aresetn] [get_bd_pins $name/aresetn]
}
connect_bd_net $clock [get_bd_pins reset/slowest_sync_clk] [get_bd_pins instantft_0/ap_clk] \
    [get_bd_pins ps/maxihpm0_fpd_aclk] [get_bd_pins ps/saxihp0_fpd_aclk] [get_bd_pins ps/saxihp1_fpd_aclk]
connect_bd_net [get_bd_pins reset/peripheral_aresetn] [get_bd_pins instantft_0/ap_rst_n]
assign_bd_address
validate_bd_design
save_bd_design

make_wrapper -files [get_files instantft_bd.bd] -top -import
set_property top instantft_bd_wrapper [current_fileset]
launch_runs impl_1 -to_step write_bitstream -jobs 4
wait_on_run impl_1
if {[get_property PROGRESS [get_runs impl_1]] ne "100%"} { error "the implementation did not finish" }
open_run impl_1
report_timing_summary -file [file join $out timing.txt]
report_utilization -file [file join $out utilisation.txt]
report_power -file [file join $out power.txt]
file copy -force [glob [file join $here project instantft.runs impl_1 *.bit]] [file join $out instantft.bit]
file copy -force [glob [file join $here project instantft.gen sources_1 bd instantft_bd hw_handoff instantft_bd.hwh]] \
    [file join $out instantft.hwh]
close_project
